"""Admission: a body is decoded and checked, and becomes what the generator is asked; or it is refused at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from runtime.errors import InputError, one_line
from runtime.preparation import RequestOptions
from runtime.sampling import Sampling
from runtime.serving.errors import ApiError
from runtime.serving.requests import (
    UNSUPPORTED,
    UNSUPPORTED_INSIDE,
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    InputItem,
    Request,
    ResponseRequest,
    StreamOptions,
    ToolMessage,
)
from runtime.serving.settings import Settings
from runtime.serving.structured import Format, grammar_of
from runtime.serving.tool_types import ToolCall

R = TypeVar("R", bound=Request)
# Seeds are taken modulo this.
SEEDS = 1 << 64


def decode(body: bytes, kind: type[R]) -> R:
    """Return the request in `body`. Raises `ApiError` for one that does not fit."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        # It repeats names that the client has chosen, of any number of lines.
        raise _unfit(one_line(" ".join(str(error).splitlines()))) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise ApiError(400, f"the body is not JSON ({one_line(error)})", code="invalid_json") from error


def _unfit(message: str) -> ApiError:
    if unknown := re.match(r"Object contains unknown field `(.+?)`(?: - at `\$(.*)`)?$", message):
        name = unknown[1]
        reason = (UNSUPPORTED_INSIDE | UNSUPPORTED).get(name, "it is no field that this server knows")
        where = _param(f"{unknown[2] or ''}.{name}")
        return ApiError(
            400, f"{where} cannot be honoured: {reason}; leave it out", param=where, code="unknown_parameter"
        )
    if missing := re.match(r"Object missing required field `(.+?)`(?: - at `\$(.*)`)?$", message):
        where = _param(f"{missing[2] or ''}.{missing[1]}")
        return ApiError(400, f"{where} is missing", param=where, code="missing_required_parameter")
    told, _, at = message.partition(" - at ")
    found = re.search(r"`\$(.*?)`$", at)
    where = _param(found[1]) if found else ""
    names = re.findall(r"[a-z_]+", where) or [""]
    inside = UNSUPPORTED_INSIDE.get(names[-1]) if names[0] in ("messages", "input") else None
    why = UNSUPPORTED.get(names[0]) or inside
    about = f"{where}: " if where else ""
    more = f"; {why}" if why else ""
    return ApiError(400, f"{about}{told}{more}", param=where or None, code="invalid_value")


def _param(path: str) -> str:
    return path.lstrip(".")


def check_model(request: Request, names: Sequence[str]) -> None:
    """Raise `ApiError` unless a model is served under the name that is asked for."""
    if request.model not in names:
        raise ApiError(
            404,
            f"there is no model {request.model!r} here; this server has {', '.join(names)}",
            param="model",
            code="model_not_found",
        )


def check_streaming(request: Request, options: StreamOptions | None) -> None:
    """Raise `ApiError` for options of a stream where there is none, and for what nobody can have."""
    if options is not None and not request.stream:
        raise _refused("stream_options", "stream_options is for streams; set stream, or leave it out")
    if request.store:
        raise _refused("store", "nothing is stored here; set store to false, or leave it out")


def sampling_of(request: Request, logprobs: int | None, answer: Format | None = None, where: str = "") -> Sampling:
    """Return how a request's tokens are chosen, with the log-probabilities of so many of the best; `answer`, at `where`
    in the request, is the format that it shall have. Raises `ApiError`.

    Greedily top-k, top-p and min-p have no effect: the most probable token is always among those that they keep.
    """
    temperature = 1.0 if request.temperature is None else request.temperature
    top_k = None if request.top_k in (None, -1, 0) else request.top_k
    draws = temperature > 0
    grammar = grammar_of(answer, where, request.grammar, request.regex)
    try:
        return Sampling(
            temperature=temperature,
            top_k=top_k if draws else None,
            top_p=request.top_p if draws else None,
            min_p=request.min_p if draws else None,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
            logit_bias=_biases(request.logit_bias or {}),
            min_new_tokens=request.min_tokens or 0,
            seed=None if request.seed is None else request.seed % SEEDS,
            grammar=grammar,
            # The best one at least, from which the chosen one is told apart.
            logprobs=0 if logprobs is None else max(1, logprobs),
        )
    except InputError as error:
        name = str(error).split()[0]
        param = name if name in Request.__struct_fields__ else None
        raise ApiError(400, str(error), param=param, code="invalid_value") from error


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    for token in given:
        if str(int(token)) != token:
            # A pattern ends before a last line break, too; and no token may be there twice.
            raise _refused("logit_bias", f"logit_bias has {token!r}; give token ids such as {str(int(token))!r}")
    return {int(token): bias for token, bias in given.items()}


def options_of(request: Request, most: int | None, settings: Settings) -> RequestOptions:
    """Return what else the generator is asked, with up to `most` new tokens, None for as many as fit."""
    stop = request.stop
    options: RequestOptions = {
        "max_new_tokens": _within(most, settings),
        "stop": [stop] if isinstance(stop, str) else stop or [],
        "speculate": request.speculate is not False,
        "text_pool": request.text_pool is not False,
        "prediction": None if request.prediction is None else text_of(request.prediction.content),
        "priority": request.priority or 0,
        "deadline_s": request.deadline,
        "ignore_stop_tokens": bool(request.ignore_eos),
    }
    return options


def _within(most: int | None, settings: Settings) -> int | None:
    allowed = settings.max_tokens
    if allowed is None:
        return most
    if most is not None and most > allowed:
        raise _refused("max_tokens", f"max_tokens is {most}, and this server allows {allowed}; ask for fewer")
    return allowed if most is None else most


def check_answers(count: int, settings: Settings) -> None:
    """Raise `ApiError` for more answers than one request may ask for."""
    if count > settings.max_answers:
        raise _refused(
            "n", f"the request asks for {count} answers, and this server allows {settings.max_answers} at once"
        )


def most_of_chat(request: ChatRequest) -> int | None:
    """Return the new tokens that a chat asks for."""
    one, other = request.max_tokens, request.max_completion_tokens
    if one is not None and other is not None and one != other:
        raise _refused("max_tokens", f"max_tokens is {one}, and max_completion_tokens {other}; give one of them")
    return other if one is None else one


def logprobs_of_chat(request: ChatRequest) -> int | None:
    """Return how many log-probabilities of the best tokens a chat asks for, None for none at all."""
    if request.top_logprobs is not None and not request.logprobs:
        raise _refused("top_logprobs", "top_logprobs is for logprobs; set logprobs to true, or leave it out")
    return (request.top_logprobs or 0) if request.logprobs else None


def logprobs_of_response(request: ResponseRequest) -> int | None:
    """Return the same for a response."""
    if request.top_logprobs is not None and not request.include:
        raise _refused(
            "top_logprobs", "top_logprobs needs 'message.output_text.logprobs' in include; add it, or leave it out"
        )
    return (request.top_logprobs or 0) if request.include else None


def check_response(request: ResponseRequest) -> None:
    """Raise `ApiError` for what a response cannot be."""
    if request.background:
        raise _refused("background", "nothing goes on in the background; set background to false, or leave it out")
    if request.stream_options is not None and request.stream_options.include_usage:
        raise _refused("stream_options", "the usage is in response.completed always; leave include_usage out")
    if request.stream_options is not None and request.stream_options.include_passes:
        raise _refused("stream_options", "passes are told of chats and completions; leave include_passes out")


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts of a completion. Raises `ApiError` for what is none."""
    given: Any = request.prompt
    several = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
    for one in several:
        tokens = isinstance(one, list) and bool(one) and all(type(token) is int for token in one)
        if not isinstance(one, str) and not tokens:
            raise _refused(
                "prompt", "prompt must be a string, a list of token ids, or a list of strings or of lists of token ids"
            )
    return several


def check_completion(request: CompletionRequest) -> None:
    """Raise `ApiError` for what a completion cannot be."""
    if request.best_of is not None and request.best_of > (request.n or 1):
        raise _refused("best_of", f"best_of is {request.best_of}: every answer is sent; set n, and leave best_of out")
    if request.best_of is not None and request.best_of < (request.n or 1):
        raise _refused("best_of", f"best_of is {request.best_of}, and n {request.n}; leave best_of out")
    if request.max_tokens == 0 and not (request.echo and request.logprobs is not None):
        raise _refused("max_tokens", "max_tokens is 0, which is for echo with logprobs; ask for one token at least")


def text_of(content: str | list[Any]) -> str:
    """Return the text of a message."""
    return content if isinstance(content, str) else "".join([part.text for part in content])


def messages_of_chat(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the conversation as the model's template takes it. Raises `ApiError` for an answer that is none."""
    found = []
    for index, message in enumerate(request.messages):
        role = str(type(message).__struct_config__.tag)
        told: dict[str, Any] = {"role": "system" if role == "developer" else role}
        calls = message.tool_calls if isinstance(message, AssistantMessage) else None
        if message.content is not None:
            told["content"] = text_of(message.content)
        elif not calls:
            where = f"messages[{index}].content"
            raise _refused(where, f"{where} is null, and there are no tool_calls; give one of them")
        if calls:
            told["tool_calls"] = [{"id": call.id, "type": "function", "function": _called(call)} for call in calls]
        if isinstance(message, ToolMessage):
            told["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            told["name"] = message.name
        found.append(told)
    return found


def _called(call: ToolCall) -> dict[str, str]:
    return {"name": call.function.name, "arguments": call.function.arguments}


def messages_of_response(request: ResponseRequest) -> list[dict[str, Any]]:
    """Return the conversation of a response as the model's template takes it."""
    found: list[dict[str, Any]] = []
    if request.instructions:
        found.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*found, {"role": "user", "content": request.input}]
    for index, item in enumerate(request.input):
        where = f"input[{index}]"
        if item.type == "function_call":
            _check_item(item, where, ("call_id", "name", "arguments"))
            function = {"name": item.name, "arguments": item.arguments}
            _last_answer(found).append({"id": item.call_id, "type": "function", "function": function})
        elif item.type == "function_call_output":
            _check_item(item, where, ("call_id", "output"))
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output or "")})
        else:
            _check_item(item, where, ("role", "content"))
            role = "system" if item.role == "developer" else item.role
            found.append({"role": role, "content": text_of(item.content or "")})
    return found


def _check_item(item: InputItem, where: str, needed: Sequence[str]) -> None:
    for name in ("role", "content", "call_id", "name", "arguments", "output"):
        missing = getattr(item, name) is None
        if missing and name in needed:
            raise ApiError(
                400, f"{where}.{name} is missing", param=f"{where}.{name}", code="missing_required_parameter"
            )
        if not missing and name not in needed:
            kind = item.type or "message"
            raise _refused(f"{where}.{name}", f"{where}.{name} is no part of an item of type {kind}; leave it out")


def _last_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the calls of the last of `messages`, an answer, or else of one more: an answer's items are one message."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    calls: list[dict[str, Any]] = messages[-1].setdefault("tool_calls", [])
    return calls


def check_logprobs_of_calls(request: ResponseRequest, calls: bool) -> None:
    """Raise `ApiError` for log-probabilities of text that may be calls, which have no place in a response."""
    if calls and request.include:
        raise _refused("include", "an answer that may call tools has no logprobs in responses; leave include out")


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
