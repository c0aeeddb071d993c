"""What clients may ask for: the fields of each request, with their ranges, as msgspec decodes and documents them.

msgspec, on which the runtime depends already, does here what pydantic would: it checks types and ranges while it
decodes, refuses unknown fields, and writes the JSON schema of the OpenAPI document; in a tenth of the time.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from runtime.serving.structured import FlatJsonSchema, JsonObject, JsonSchema, Pattern, TextFormat
from runtime.serving.tool_types import (
    ArgumentsText,
    CalledName,
    CallId,
    Choice,
    FlatToolChoice,
    FlatTools,
    ToolCall,
    Tools,
)

Text = Annotated[str, Meta(max_length=1 << 24)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Label = Annotated[str, Meta(max_length=512)]
Nothing = Annotated[list[Any], Meta(max_length=0)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
Token = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
# Each is checked, while others wait.
MOST_BIASES = 4096
TokenKey = Annotated[str, Meta(pattern="^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Tops = Annotated[int, Meta(ge=0, le=20)]


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="text"):
    """A part of a message that is text."""

    text: Text


class PredictedContent(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer is expected to be mostly like, such as a file to be edited."""

    type: Literal["content"]
    content: Text | list[TextPart]


class Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What every request for an answer may have. null is what a field has that is left out.

    `PROMPT` is the name of the field that has the prompt.
    """

    PROMPT: ClassVar[str]

    model: Annotated[Name, Meta(description="A name that /v1/models lists.")]
    stream: Annotated[bool | None, Meta(description="Send the answer as server-sent events.")] = None
    temperature: Annotated[
        Annotated[float, Meta(ge=0.0, le=2.0)] | None,
        Meta(description="0 is greedy, else 0.01 to 2; 1 where it is left out."),
    ] = None
    top_p: Annotated[
        Annotated[float, Meta(gt=0.0, le=1.0)] | None,
        Meta(description="Draw from the most probable tokens that together have this probability."),
    ] = None
    top_k: Annotated[
        Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] | None,
        Meta(description="Draw from the k most probable tokens; 0 and -1 for all. An extension."),
    ] = None
    min_p: Annotated[
        Annotated[float, Meta(ge=0.0, le=1.0)] | None,
        Meta(description="Draw from tokens at least so many times as probable as the best one. An extension."),
    ] = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[
        Annotated[float, Meta(ge=0.01, le=100.0)] | None,
        Meta(description="Divides the logits of all tokens so far where they are positive. An extension."),
    ] = None
    logit_bias: Annotated[
        Annotated[dict[TokenKey, Bias], Meta(max_length=MOST_BIASES)] | None,
        Meta(description="Token id, as a string, to what is added to its logit."),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None,
        Meta(description="The same seed gives the same answer; negative ones count from 2**64 down."),
    ] = None
    stop: Annotated[
        StopText | Annotated[list[StopText], Meta(max_length=16)] | None,
        Meta(description="Strings that end the answer, and are left out of it."),
    ] = None
    min_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None,
        Meta(description="No end of text before so many new tokens. An extension."),
    ] = None
    ignore_eos: Annotated[
        bool | None, Meta(description="Go on after the model's end of text, for measuring. An extension.")
    ] = None
    grammar: Annotated[
        Pattern | None, Meta(description="What the answer must be, in llguidance's Lark. An extension.")
    ] = None
    regex: Annotated[
        Pattern | None, Meta(description="What all of the answer must match, in Rust's syntax. An extension.")
    ] = None
    speculate: Annotated[bool | None, Meta(description="false decodes plainly, to the same text. An extension.")] = None
    text_pool: Annotated[
        bool | None,
        Meta(description="false drafts nothing from a pool of other answers, nor puts this one in. An extension."),
    ] = None
    prediction: Annotated[
        PredictedContent | None,
        Meta(description="What the answer is expected to be mostly like: it comes sooner then, and is the same."),
    ] = None
    priority: Annotated[
        Annotated[int, Meta(ge=-1000, le=1000)] | None,
        Meta(description="Requests of a higher one run first. An extension."),
    ] = None
    deadline: Annotated[
        Annotated[float, Meta(ge=0.0, le=86400.0)] | None,
        Meta(description="Seconds after which the answer ends as it is then. An extension."),
    ] = None
    user: Annotated[Label | None, Meta(description="No effect.")] = None
    safety_identifier: Annotated[Label | None, Meta(description="No effect.")] = None
    prompt_cache_key: Annotated[Label | None, Meta(description="No effect: prompts find what is cached.")] = None
    service_tier: Annotated[Literal["auto", "default"] | None, Meta(description="No effect.")] = None
    metadata: Annotated[Annotated[dict[Label, Label], Meta(max_length=16)] | None, Meta(description="No effect.")] = (
        None
    )
    store: Annotated[bool | None, Meta(description="false: nothing is stored here.")] = None


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options for streaming."""

    include_usage: Annotated[bool | None, Meta(description="One more chunk, with the usage.")] = None
    continuous_usage_stats: Annotated[
        bool | None, Meta(description="The usage so far in each chunk. An extension.")
    ] = None
    include_passes: Annotated[
        bool | None,
        Meta(description="The passes that brought each chunk, with the trees that they verified. An extension."),
    ] = None
    include_obfuscation: Annotated[bool | None, Meta(description="No effect: nothing is obfuscated.")] = None


class SystemMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="role", tag="system"):
    """What the model is told to be."""

    content: Text | list[TextPart]
    name: Name | None = None


class DeveloperMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="role", tag="developer"):
    """The newer name of a system message; the model's template sees a system message."""

    content: Text | list[TextPart]
    name: Name | None = None


class UserMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="role", tag="user"):
    """What the user says."""

    content: Text | list[TextPart]
    name: Name | None = None


class AssistantMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="role", tag="assistant"):
    """An earlier answer, as it was had from this server: its text, its calls of tools, or both."""

    content: Text | list[TextPart] | None = None
    name: Name | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=1024)] | None = None
    annotations: Nothing | None = None
    # What OpenAI's client makes of a streamed answer.
    parsed: Annotated[Any, Meta(description="No effect.")] = None


class ToolMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="role", tag="tool"):
    """What came of a call."""

    content: Text | list[TextPart]
    tool_call_id: Name
    name: Name | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class ChatRequest(Request, kw_only=True):
    """The body of POST /v1/chat/completions."""

    PROMPT = "messages"

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[Count | None, Meta(description="New tokens, at most.")] = None
    max_completion_tokens: Annotated[Count | None, Meta(description="The newer name of max_tokens.")] = None
    n: Annotated[Count | None, Meta(description="How many answers.")] = None
    logprobs: Annotated[bool | None, Meta(description="The log-probability of each token.")] = None
    top_logprobs: Annotated[Tops | None, Meta(description="And those of so many of the best.")] = None
    stream_options: StreamOptions | None = None
    response_format: TextFormat | JsonObject | JsonSchema | None = None
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    tools: Annotated[Tools | None, Meta(description="Functions that the model may call.")] = None
    tool_choice: Annotated[
        Choice | None, Meta(description="auto where there are tools; none as if there were none; required, or a name.")
    ] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="false: one call at most.")] = None


Tokens = Annotated[list[Token], Meta(min_length=1)]


class CompletionRequest(Request, kw_only=True):
    """The body of POST /v1/completions."""

    PROMPT = "prompt"

    prompt: Annotated[
        Any,
        Meta(
            description="A string, a list of token ids, or a list of strings or of such lists.",
            extra_json_schema={
                "oneOf": [
                    {"type": "string"},
                    {"type": "array", "minItems": 1, "items": {"type": "string"}},
                    {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                    {
                        "type": "array",
                        "minItems": 1,
                        "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                    },
                ]
            },
        ),
    ]
    max_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None,
        Meta(description="New tokens, at most; 16 where it is left out. 0 is for echo with logprobs."),
    ] = None
    n: Annotated[Count | None, Meta(description="How many answers to each prompt.")] = None
    best_of: Annotated[Count | None, Meta(description="No more than n: nothing is drawn that is not sent.")] = None
    logprobs: Annotated[
        Tops | None, Meta(description="The log-probability of each token, and of so many of the best.")
    ] = None
    echo: Annotated[bool | None, Meta(description="The prompt in front of the answer.")] = None
    suffix: None = None
    stream_options: StreamOptions | None = None


class OutputTextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="output_text"):
    """A part of an earlier answer."""

    text: Text
    annotations: Nothing | None = None
    logprobs: list[Any] | None = None


class InputTextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="input_text"):
    """A part of a message that is text."""

    text: Text


class InputItem(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of a conversation, an earlier answer of this server's among them (with `role` and `content`), a call of
    an earlier answer (with `call_id`, `name` and `arguments`), or what came of it (with `call_id` and `output`).
    """

    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | list[InputTextPart | OutputTextPart] | None = None
    type: Literal["message", "function_call", "function_call_output"] | None = None
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    call_id: CallId | None = None
    name: CalledName | None = None
    arguments: ArgumentsText | None = None
    output: Text | list[InputTextPart] | None = None


class TextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What text the answer shall be."""

    format: TextFormat | JsonObject | FlatJsonSchema | None = None


class ResponseRequest(Request, kw_only=True):
    """The body of POST /v1/responses."""

    PROMPT = "input"

    input: Text | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: Annotated[Text | None, Meta(description="A system message in front.")] = None
    max_output_tokens: Annotated[Count | None, Meta(description="New tokens, at most.")] = None
    top_logprobs: Annotated[Tops | None, Meta(description="With include, so many of the best.")] = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Annotated[bool | None, Meta(description="false: answers come at once.")] = None
    previous_response_id: None = None
    conversation: None = None
    reasoning: None = None
    tools: Annotated[FlatTools | None, Meta(description="Functions that the model may call.")] = None
    tool_choice: Annotated[
        FlatToolChoice | None,
        Meta(description="auto where there are tools; none as if there were none; required, or a name."),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="false: one call at most.")] = None
    stream_options: StreamOptions | None = None


# Why a field, or a value of one, cannot be had.
UNSUPPORTED = {
    "tools": "tools are functions",
    "tool_choice": "it is none, auto, required, or a function by its name",
    "functions": "give tools in its place",
    "function_call": "give tool_choice in its place",
    "modalities": "answers are text",
    "audio": "answers are text",
    "reasoning": "reasoning cannot be set",
    "reasoning_effort": "reasoning cannot be set",
    "verbosity": "verbosity cannot be set",
    "web_search_options": "this server searches nothing",
    "suffix": "the model continues texts and fills no gaps",
    "previous_response_id": "nothing is stored; send the whole conversation as input",
    "conversation": "nothing is stored; send the whole conversation as input",
    "prompt": "there are no stored prompts; give input and instructions",
    "truncation": "prompts are not cut; shorten them",
}
# And in messages.
UNSUPPORTED_INSIDE = {
    "audio": "messages are made of text",
    "function_call": "give tool_calls in its place",
    "tool_calls": "a call has an id and a function with its name and arguments",
    "role": "messages are of the roles system, developer, user, assistant and tool",
    "type": "messages are made of text",
}
