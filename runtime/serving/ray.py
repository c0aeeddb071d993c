"""Replicas by Ray Serve: `serve run runtime.serving.ray:build engine=/engines/engine.onnx max_replicas=4`.

Two deployments: `Front` takes HTTP, and `Replica` has an engine and the same application as `ht-serve`, which is asked
in its process. What begins alike goes to the same replica, so that cached prompts are found, as long as that has room.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from runtime.drafting.text_pool import MOST_TOKENS
from runtime.errors import EngineError, InputError
from runtime.generator import Generator
from runtime.serving.app import create_app
from runtime.serving.asgi import Message, Receive, Scope, Send
from runtime.serving.connection import ClientGoneError, read_body, unless_gone
from runtime.serving.errors import ApiError
from runtime.serving.keys import read_keys
from runtime.serving.settings import Settings
from runtime.serving.streaming import DONE, event

# Characters of a prompt by which its replica is chosen: a system prompt differs within them, if at all.
KEY_CHARACTERS = 512
# Where a prompt's beginning is: the first of these fields that a request has.
BEGINNINGS = ("messages", "prompt", "instructions", "input")
# Messages of an answer that wait for whoever takes them on.
WAITING = 64
# What of a request's scope goes to another process.
CARRIED = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "root_path")

# Seconds of load that Ray looks back on before it adds or takes away a replica, and between two looks, at most.
LOOK_BACK_S, LOOK_S = 30.0, 10.0

Count = Annotated[int, Meta(ge=1, le=1 << 20)]
Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What `build` takes. Each of `min_replicas` to `max_replicas` replicas has an engine, and runs `max_batch`
    requests at once; there are as many replicas as it takes for no more than that to be under way in each, on average.
    The rest is as in `Generator`; `models` are names with commas between them.
    """

    engine: str
    models: str = ""
    api_key_file: str | None = None
    min_replicas: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
    max_replicas: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
    max_batch: Count = 16
    max_queue: Count = 128
    drain_s: Annotated[float, Meta(ge=0.0, le=86400.0)] = 30.0
    upscale_s: Annotated[float, Meta(ge=0.0)] = 30.0
    downscale_s: Annotated[float, Meta(ge=0.0)] = 300.0
    num_cpus: Annotated[float, Meta(ge=0.0)] = 1.0
    num_gpus: Annotated[float, Meta(ge=0.0)] = 0.0
    threads: Count | None = None
    device: str | None = None
    adapt: bool = True
    cache_bytes: Size | None = None
    prefix_cache_bytes: Size | None = None
    gpu_memory_bytes: Size | None = None
    text_pool_tokens: Annotated[int, Meta(ge=0, le=MOST_TOKENS)] = 0
    route_by_prefix: bool = True
    playground: bool = True


class PrefixRouter(RequestRouter):
    """Ranks replicas by a hash of theirs and of a request's key (rendezvous hashing): the same key has the same replica
    while that is there and has room, then the same second one, and a replica that comes or goes moves no other's keys.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`: the first group that has room is taken."""
        key = str(pending_request.args[0]) if pending_request is not None and pending_request.args else ""
        return [[one] for one in ranked(candidate_replicas, key)]


def ranked(replicas: Sequence[RunningReplica], key: str) -> list[RunningReplica]:
    """Return `replicas`, those first that requests of this `key` should go to."""
    return sorted(replicas, key=lambda one: hashlib.sha256(f"{one.replica_id.unique_id} {key}".encode()).digest())


def key_of(body: bytes) -> str:
    """Return what requests have in common whose prompts begin alike; of a body that is no request, nothing."""
    try:
        asked = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        return ""
    field = next((name for name in BEGINNINGS if isinstance(asked, dict) and asked.get(name)), None)
    if field is None:
        return ""
    found = asked[field]
    # Of a conversation the first message; of several prompts the first.
    while isinstance(found, list) and found and isinstance(found[0], dict | str | list):
        found = found[0]
    if isinstance(found, dict):
        found = found.get("content")
    return json.dumps(found)[:KEY_CHARACTERS]


class Replica:
    """An engine, and the application that serves it."""

    def __init__(self, options: Options) -> None:
        self._generator = Generator(
            options.engine,
            device=options.device,
            threads=options.threads,
            adapt=options.adapt,
            max_batch=options.max_batch,
            max_queue=options.max_queue,
            cache_bytes=options.cache_bytes,
            prefix_cache_bytes=options.prefix_cache_bytes,
            gpu_memory_bytes=options.gpu_memory_bytes,
            text_pool_tokens=options.text_pool_tokens,
        )
        # It is asked when it is made, and not before.
        self._generator.warm_up()
        names = tuple(name for name in options.models.split(",") if name)
        keys = () if options.api_key_file is None else read_keys(Path(options.api_key_file))
        settings = Settings(models=names, api_keys=keys, warm_up=False, playground=options.playground)
        self._app = create_app(self._generator, settings)

    async def answer(self, key: str, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message]:
        """Yield the messages of ASGI that answer a request; whoever stops taking them is a client that leaves."""
        messages: asyncio.Queue[Message | BaseException | None] = asyncio.Queue(WAITING)
        given = False

        async def receive() -> Message:
            nonlocal given
            if given:
                await asyncio.Event().wait()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def run() -> None:
            try:
                await self._app({**scope, "asgi": {"version": "3.0"}}, receive, messages.put)
                await messages.put(None)
            except Exception as error:
                await messages.put(error)

        running = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                if isinstance(message, BaseException):
                    raise message
                yield message
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    def check_health(self) -> None:
        """Raise where the engine has failed: Ray makes another replica then."""
        if self._generator.failure is not None:
            raise EngineError(str(self._generator.failure))

    def __del__(self) -> None:
        # After Ray has let requests under way end, for as long as they may take.
        with contextlib.suppress(AttributeError):
            self._generator.close()


class Front:
    """An ASGI application that has requests answered by replicas; `handle` is that of their deployment."""

    def __init__(self, handle: Any, settings: Settings) -> None:
        self._handle = handle.options(stream=True, method_name="answer")
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await _lifespan(receive, send)
        begun = False

        async def tell(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            body = b""
            if scope["method"] == "POST":
                body = await read_body(scope, receive, self._settings.max_body, self._settings.body_s)
            await unless_gone(receive, self._answer(scope, body, tell))
        except ClientGoneError:
            return None
        except Exception as error:
            told = _told(error)
            if begun:
                await send({"type": "http.response.body", "body": event(told.answer) + DONE})
                return None
            await send(told.start)
            await send({"type": "http.response.body", "body": told.body})

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        carried = {name: scope[name] for name in CARRIED if name in scope}
        carried["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        answer = self._handle.remote(key_of(body), carried, body)
        try:
            async for message in answer:
                await send(message)
        except BaseException:
            answer.cancel()
            raise


async def _lifespan(receive: Receive, send: Send) -> None:
    for kind in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{kind}.complete"})


def _told(error: Exception) -> ApiError:
    """Return what to answer where no replica does."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BackPressureError):
        return ApiError(
            429,
            "all replicas have as much as they take; try again later",
            type="rate_limit_error",
            code="queue_full",
            headers={"retry-after": "1"},
        )
    lost = isinstance(error, RayError)
    return ApiError(
        503,
        "the replica that answered was lost; try again" if lost else "no replica answers; try again later",
        type="service_unavailable_error",
        code="replica_lost" if lost else "unavailable",
        headers={"retry-after": "1"},
    )


def _front() -> Front:
    name = serve.get_replica_context().app_name
    return Front(serve.get_deployment_handle(Replica.__name__, app_name=name), Settings(warm_up=False))


def options_of(given: dict[str, Any]) -> Options:
    """Return the options that were given, also as strings. Raises `InputError` where they do not fit."""
    try:
        options = msgspec.convert(given, Options, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(f"{error}; give options such as engine=/engines/engine.onnx max_replicas=4") from error
    if options.max_replicas < options.min_replicas:
        raise InputError(
            f"max_replicas is {options.max_replicas}, fewer than min_replicas, {options.min_replicas}; give more"
        )
    return options


def build(given: dict[str, Any]) -> serve.Application:
    """Return the application of Ray Serve with these `Options`. Raises `InputError` where they do not fit."""
    options = options_of(given)
    # Of these Ray states no types, or others than it takes.
    made: Any = serve.deployment
    router: Any = PrefixRouter
    # No longer than what was asked for, or a replica would come and go later than that.
    look_back = min(LOOK_BACK_S, max(1.0, min(options.upscale_s, options.downscale_s)))
    replicas = made(
        Replica,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        # What runs in a replica, and as many that wait there for it: more would be better off elsewhere.
        max_ongoing_requests=2 * options.max_batch,
        max_queued_requests=options.max_queue,
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.max_batch,
            "upscale_delay_s": options.upscale_s,
            "downscale_delay_s": options.downscale_s,
            "look_back_period_s": look_back,
            "metrics_interval_s": min(LOOK_S, look_back),
        },
        # Else Ray's own: of two replicas, chosen at random, the one that has less to do.
        request_router_config=RequestRouterConfig(request_router_class=router)
        if options.route_by_prefix
        else RequestRouterConfig(),
        graceful_shutdown_timeout_s=options.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=30,
    )
    front = made(
        serve.ingress(_front)(),
        name="Front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1 << 16,
        graceful_shutdown_timeout_s=options.drain_s,
    )
    application: serve.Application = front.bind(replicas.bind(options))
    return application
