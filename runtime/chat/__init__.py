"""Chat templates: a model's own Jinja code, which makes a prompt of messages, rendered in a process with limits."""

from runtime.chat.conversation import Message
from runtime.chat.template import ChatTemplate, InvalidTemplateError

__all__ = ["ChatTemplate", "InvalidTemplateError", "Message"]
