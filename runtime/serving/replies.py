"""What clients get: the objects of each answer and of each chunk of a stream, as OpenAI's API has them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from runtime.serving.structured import FlatJsonSchema, JsonObject, TextFormat
from runtime.serving.tool_types import FlatChoice, FlatFunctionTool, ToolCall, ToolCallDelta

Finish = Literal["stop", "length", "tool_calls"]


class PromptDetails(msgspec.Struct):
    """Of the prompt's tokens, those whose rows were there already."""

    cached_tokens: int = 0


class CompletionDetails(msgspec.Struct):
    """Tokens of the request's prediction that are in the answer, and those that are not. Without a prediction: tokens
    that were drafted and accepted, and those that were drafted and rejected. The latter are in no other number.
    """

    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """Tokens of a request: of its prompts, each counted once, and of all answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(msgspec.Struct):
    """A token and its log-probability; a part of a character has bytes alone."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """The token chosen, and the best in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """An entry for each token."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantText(msgspec.Struct):
    """An answer: text, calls of tools, or both."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One of the answers. `stop_reason` is "deadline" where that ended it: an extension."""

    index: int
    message: AssistantText
    finish_reason: Finish
    logprobs: ChatLogprobs | None = None
    stop_reason: str | None = None


class ChatCompletion(msgspec.Struct):
    """The answer to POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    system_fingerprint: str | None = None
    service_tier: None = None


class TreeNode(msgspec.Struct):
    """A candidate that a pass verified; `parent` is its place among the nodes, -1 for the root, the token that was
    certain before. `probability` is that of its path as the drafts have it, `sources` who proposed it.
    """

    token: int
    text: str
    parent: int
    probability: float
    sources: list[str]


class NewToken(msgspec.Struct):
    """A token that became certain: its `text` alone, and what it `adds` to the answer."""

    token: int
    text: str
    adds: str


class VerifiedPass(msgspec.Struct):
    """A pass of the engine: of a part of the prompt, without nodes, or of a tree. Its tokens are those of the
    `accepted` nodes after the root, and the one that the model chose after them. An extension.
    """

    prompt: bool
    rows: int
    pseudo_rows: list[int]
    seconds: float
    nodes: list[TreeNode]
    accepted: list[int]
    tokens: list[NewToken]


class Delta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(msgspec.Struct):
    """A part of one of the answers; `passes` brought it, where stream_options.include_passes asks for them."""

    index: int
    delta: Delta
    finish_reason: Finish | None = None
    logprobs: ChatLogprobs | None = None
    stop_reason: str | None = None
    passes: list[VerifiedPass] | UnsetType = UNSET


class ChatChunk(msgspec.Struct):
    """An event of a streamed chat completion."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    system_fingerprint: str | None = None
    usage: Usage | None = None


class TextLogprobs(msgspec.Struct):
    """A list for each kind, with an entry for each token; where each begins in the text, in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    """One of the answers, or a part of one, with its passes as in `ChunkChoice`."""

    index: int
    text: str
    finish_reason: Finish | None = None
    logprobs: TextLogprobs | None = None
    stop_reason: str | None = None
    passes: list[VerifiedPass] | UnsetType = UNSET


class Completion(msgspec.Struct):
    """The answer to POST /v1/completions, and the events of a streamed one."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: Literal["text_completion"] = "text_completion"
    system_fingerprint: str | None = None
    usage: Usage | None = None


class Model(msgspec.Struct):
    """A name that the engine is served under; `max_model_len` is its context limit: an extension."""

    id: str
    created: int
    max_model_len: int
    owned_by: str = "hidden-transfer"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct):
    """The answer to GET /v1/models."""

    data: list[Model]
    object: Literal["list"] = "list"


class OutputText(msgspec.Struct):
    """The text of a response."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []
    type: Literal["output_text"] = "output_text"


class OutputMessage(msgspec.Struct, tag="message"):
    """A message of a response."""

    id: str
    content: list[OutputText]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"


class FunctionCallItem(msgspec.Struct, tag="function_call"):
    """A call of a function in a response."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class Incomplete(msgspec.Struct):
    """Why a response is not complete."""

    reason: str


class InputDetails(msgspec.Struct):
    """Of the input's tokens, those whose rows were there already."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    """See `CompletionDetails`; the last two are an extension."""

    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    """Tokens of a response."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails


class ResponseFailure(msgspec.Struct):
    """Why a response failed after it had begun."""

    code: str
    message: str


class Response(msgspec.Struct):
    """The answer to POST /v1/responses."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[OutputMessage | FunctionCallItem]
    temperature: float
    top_p: float
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    user: str | None = None
    usage: ResponseUsage | None = None
    error: ResponseFailure | None = None
    incomplete_details: Incomplete | None = None
    text: dict[str, TextFormat | JsonObject | FlatJsonSchema] = msgspec.field(
        default_factory=lambda: {"format": TextFormat()}
    )
    tools: list[FlatFunctionTool] = []
    tool_choice: str | FlatChoice = "auto"
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    reasoning: None = None
    store: bool = False
    truncation: str = "disabled"
    top_logprobs: int = 0
    background: bool = False
    object: Literal["response"] = "response"
