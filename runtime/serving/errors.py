"""Errors as OpenAI's clients know them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from runtime.errors import (
    BusyError,
    CancelledError,
    ClosedError,
    DeadlineError,
    EngineError,
    InputError,
    PromptTooLongError,
    ServiceError,
)

# Seconds after which somebody who was refused may ask again, at least and at most.
SOONEST, LATEST = 1, 60
JSON = ("content-type", "application/json")


class ErrorBody(msgspec.Struct):
    """What went wrong: `param` names the part of the request, `code` the kind of error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(msgspec.Struct):
    """An answer that is an error."""

    error: ErrorBody


class ApiError(Exception):
    """A request that is answered with an error of this `status`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.answer = ErrorAnswer(ErrorBody(message, type, param, code))
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        """The answer as JSON."""
        return msgspec.json.encode(self.answer)

    @property
    def start(self) -> dict[str, Any]:
        """The message of ASGI that begins the answer."""
        headers = [JSON, ("content-length", str(len(self.body))), *self.headers.items()]
        return {
            "type": "http.response.start",
            "status": self.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers],
        }


def api_error(error: BaseException, metrics: Mapping[str, Any], prompt: str | None = None) -> ApiError:
    """Return what to answer for an `error` of the generator, whose `metrics` tell how long a full queue takes; `prompt`
    is the field of the request that has its prompt.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), param=prompt, code="context_length_exceeded")
    if isinstance(error, InputError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, BusyError):
        return busy(str(error), metrics)
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), type="timeout_error", code="deadline_exceeded")
    if isinstance(error, EngineError):
        return unavailable(str(error), "engine_failed")
    if isinstance(error, ClosedError | CancelledError):
        return unavailable(str(error), "shutting_down")
    if isinstance(error, ServiceError):
        return unavailable(str(error), "unavailable")
    return ApiError(500, "the server failed; its log has more", type="server_error", code="internal_error")


def busy(message: str, metrics: Mapping[str, Any]) -> ApiError:
    """Return the error of a server that has enough to do, with the seconds after which it may have less."""
    told = {"retry-after": str(seconds_of_queue(metrics))}
    return ApiError(429, message, type="rate_limit_error", code="queue_full", headers=told)


def unavailable(message: str, code: str) -> ApiError:
    """Return the error of a server that takes no requests."""
    return ApiError(503, message, type="service_unavailable_error", code=code, headers={"retry-after": str(SOONEST)})


def seconds_of_queue(metrics: Mapping[str, Any]) -> int:
    """Return about how many seconds it takes until those that wait have run, by how long requests took so far."""
    took = metrics["request_seconds"]
    each = took["sum"] / took["count"] if took["count"] else 1.0
    turns = math.ceil(metrics["waiting"] / max(1, metrics["most_running"]))
    return round(min(LATEST, max(SOONEST, each * turns)))
