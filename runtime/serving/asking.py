"""Asking the generator: all answers of a request at once or none, their chunks as they come, and what they took."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import anyio.to_thread

from runtime.answer import GenerationChunk, GenerationResult
from runtime.generator import Generator
from runtime.preparation import RequestOptions
from runtime.prompts import Prompt
from runtime.request import Request
from runtime.serving.exchange import Exchange
from runtime.serving.replies import CompletionDetails, Finish, PromptDetails, Usage
from runtime.serving.state import Server
from runtime.several import sampling_of_answers

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """One answer that is asked for."""

    prompt: Prompt
    options: RequestOptions


def asked_for(prompts: Sequence[Prompt], answers: int, options: RequestOptions) -> list[Asked]:
    """Return what is asked for so many answers to each of `prompts`; seeds go on from one answer to the next."""
    samplings = sampling_of_answers(options.get("sampling"), answers)
    return [Asked(prompt, {**options, "sampling": one}) for prompt in prompts for one in samplings]


async def submit(generator: Generator, asked: Sequence[Asked]) -> list[Request]:
    """Queue all that is asked, or nothing; raises what `Generator.submit` does.

    Prompts are rendered and encoded in a thread, which may take long.
    """
    found: list[Request] = []

    def work() -> list[Request]:
        try:
            for one in asked:
                found.append(generator.submit(one.prompt, **one.options))
        except BaseException:
            _cancel(found)
            raise
        return found

    # Requests that nobody refers to any more end by themselves.
    return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)


@contextlib.contextmanager
def cancelled_at_the_end(requests: Sequence[Request]) -> Iterator[None]:
    """Cancel `requests` at the end of the block, however that comes: those that have ended stay as they are."""
    try:
        yield
    finally:
        _cancel(requests)


def _cancel(requests: Sequence[Request]) -> None:
    for request in requests:
        request.cancel()


async def results_of(requests: Sequence[Request]) -> list[GenerationResult]:
    """Return the results of all, once they are there. Raises the error of the first that has failed."""
    with cancelled_at_the_end(requests):
        return [await request.aresult() for request in requests]


async def chunks_of(requests: Sequence[Request]) -> AsyncIterator[tuple[int, GenerationChunk]]:
    """Yield the chunks of all as they come, each with the number of its request. Raises the error of any."""
    with cancelled_at_the_end(requests):
        if len(requests) == 1:
            async for chunk in requests[0]:
                yield 0, chunk
            return
        found: asyncio.Queue[tuple[int, GenerationChunk] | BaseException | None] = asyncio.Queue()
        tasks = [asyncio.ensure_future(_pass_on(index, request, found)) for index, request in enumerate(requests)]
        try:
            left = len(tasks)
            while left:
                one = await found.get()
                if isinstance(one, BaseException):
                    raise one
                if one is None:
                    left -= 1
                else:
                    yield one
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _pass_on(
    index: int, request: Request, target: asyncio.Queue[tuple[int, GenerationChunk] | BaseException | None]
) -> None:
    try:
        async for chunk in request:
            target.put_nowait((index, chunk))
        target.put_nowait(None)
    except Exception as error:
        target.put_nowait(error)


async def beside(work: Callable[[], T]) -> T:
    """Return what `work` returns, which is done in a thread: where there is much to write, as the log-probabilities of
    many tokens, all others would wait for the event loop.
    """
    return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)


def usage_of(results: Sequence[GenerationResult], answers: int) -> Usage:
    """Return the usage of `results`, so many for each prompt, one prompt after the other.

    Its details are of the prediction where there was one, as OpenAI has them, and of all that was drafted otherwise.
    """
    prompts = results[::answers]
    prompt, completion = sum(one.prompt_tokens for one in prompts), sum(len(one.tokens) for one in results)
    if any(one.prediction_tokens for one in results):
        accepted = sum(one.found_prediction_tokens for one in results)
        rejected = sum(one.prediction_tokens for one in results) - accepted
    else:
        accepted = sum(one.accepted_candidates for one in results)
        rejected = sum(one.candidates for one in results) - accepted
    return Usage(
        prompt,
        completion,
        prompt + completion,
        PromptDetails(sum(one.cached_prompt_tokens for one in prompts)),
        CompletionDetails(accepted, rejected),
    )


def usage_so_far(prompt: int, completion: int) -> Usage:
    """Return the usage of a stream that goes on: the details are known at its end."""
    return Usage(prompt, completion, prompt + completion, PromptDetails(), CompletionDetails())


def finish_of(result: GenerationResult) -> tuple[Finish, str | None]:
    """Return why an answer ended, as OpenAI's API says it, and the reason that it has no word for."""
    if result.finish_reason == "deadline":
        return "length", "deadline"
    return result.finish_reason, None


def note(server: Server, exchange: Exchange, results: Sequence[GenerationResult], usage: Usage) -> None:
    """Log and count answers that have come to their end."""
    for result in results:
        server.metrics.finished(result.finish_reason)
    exchange.fields |= {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.prompt_tokens_details.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "accepted_tokens": sum(result.accepted_candidates for result in results),
        "first_token_s": round(max(result.time_to_first_token_s for result in results), 4),
        "finish": [result.finish_reason for result in results],
    }
    if server.settings.log_texts:
        exchange.fields["answers"] = [result.text for result in results]
