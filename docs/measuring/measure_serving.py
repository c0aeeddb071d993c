"""Measure the CPU time that the server takes outside of the engine's passes, while it streams answers.

python3 docs/measuring/measure_serving.py engine.onnx --streams 16 --seconds 60      in an environment with [serve,cpu]

The server runs in this process and its clients in another. Counted are the thread of the event loop, the threads in
which prompts are rendered and encoded, and the engine's thread without `engine.run` and `engine.commit`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from runtime import Generator
from runtime.serving import Settings, create_app
from runtime.serving.protocol import protocol

# Seconds until all streams are under way.
BEFORE = 5.0
ENGINE_THREAD, WORKERS = "hidden-transfer engine", "AnyIO worker thread"


class Clocked:
    """Counts the CPU time of the thread that calls a function, within it, and how often it is called."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work
        self.cpu = self.wall = 0.0
        self.calls = 0

    def __call__(self, *given: Any) -> Any:
        """Call it."""
        begun, wall = time.thread_time(), time.perf_counter()
        try:
            return self._work(*given)
        finally:
            self.cpu += time.thread_time() - begun
            self.wall += time.perf_counter() - wall
            self.calls += 1


async def stream(port: int, number: int, extra: dict[str, Any]) -> None:
    """Be a client that has one answer streamed after the other, and reads them without a look."""
    for turn in range(1 << 30):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        text = f"Tell me story number {number} of book {turn}."
        body = {"model": "m", "messages": [{"role": "user", "content": text}], "stream": True, "ignore_eos": True}
        content = json.dumps({**body, "max_tokens": 128, "temperature": 0, **extra}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n"
        )
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + content)
        while await reader.read(1 << 16):
            pass
        writer.close()


async def clients(port: int, count: int, extra: dict[str, Any]) -> None:
    """Be so many clients."""
    await asyncio.gather(*[stream(port, number, extra) for number in range(count)])


def cpu_of(threads: Sequence[threading.Thread]) -> float:
    """Return the CPU time of threads of this process that run."""
    return sum(time.clock_gettime(time.pthread_getcpuclockid(one.ident)) for one in threads if one.ident is not None)


def measure(generator: Generator, loop: threading.Thread, port: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one way, whose clients send `--extra`."""
    engine: Any = generator.engine
    run, commit = Clocked(engine.run), Clocked(engine.commit)
    engine.run, engine.commit = run, commit
    asking = subprocess.Popen(
        [sys.executable, __file__, "--port", str(port), "--streams", str(options.streams), "--extra", options.extra]
    )
    try:
        time.sleep(BEFORE)

        def look() -> dict[str, float]:
            threads = threading.enumerate()
            told = generator.metrics()
            return {
                "at": time.perf_counter(),
                "loop": cpu_of([loop]),
                "workers": cpu_of([one for one in threads if one.name.startswith(WORKERS)]),
                "engine_thread": cpu_of([one for one in threads if one.name == ENGINE_THREAD]),
                "run_cpu": run.cpu,
                "run_wall": run.wall,
                "commit_cpu": commit.cpu,
                "passes": told["decode_passes"] + told["prompt_passes"],
                "decode_passes": told["decode_passes"],
                "tokens": told["chosen_tokens"],
            }

        before = look()
        time.sleep(options.seconds)
        found = {name: value - before[name] for name, value in look().items()}
    finally:
        asking.kill()
        asking.wait()
    scheduling = found["engine_thread"] - found["run_cpu"] - found["commit_cpu"]
    passes, seconds = found["passes"], found["at"]
    serving = found["loop"] + found["workers"]
    return {
        "extra": json.loads(options.extra),
        "streams": options.streams,
        "threads": options.threads,
        "seconds": round(seconds, 1),
        "passes": int(passes),
        "decode_passes": int(found["decode_passes"]),
        "tokens_per_second": round(found["tokens"] / seconds, 1),
        "step_ms": round(1e3 * seconds / passes, 2),
        "engine_run_ms": round(1e3 * found["run_wall"] / passes, 2),
        "event_loop_cpu_ms": round(1e3 * found["loop"] / passes, 3),
        "worker_cpu_ms": round(1e3 * found["workers"] / passes, 3),
        "scheduling_cpu_ms": round(1e3 * scheduling / passes, 3),
        "event_loop_and_workers_share": round(serving / seconds, 4),
        "all_outside_of_passes_share": round((serving + scheduling) / seconds, 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", nargs="?", help="engine file")
    parser.add_argument("--streams", type=int, default=16, help="answers that are streamed at once (default: 16)")
    parser.add_argument("--seconds", type=float, default=60.0, help="default: 60")
    parser.add_argument("--threads", type=int, help="of the engine")
    parser.add_argument("--extra", default="{}", help='fields of requests, such as {"speculate": false}')
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.port is not None:
        asyncio.run(clients(options.port, options.streams, json.loads(options.extra)))
        return
    with Generator(options.engine, threads=options.threads, max_batch=options.streams) as generator:
        generator.warm_up()
        app = create_app(generator, Settings(models=("m",), warm_up=False))
        http: Any = protocol(30.0, 30.0)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, http=http, log_config=None, access_log=False)
        config.timeout_graceful_shutdown = 1
        server = uvicorn.Server(config)
        loop = threading.Thread(target=server.run)
        loop.start()
        while not server.started:
            time.sleep(0.01)
        try:
            found = measure(generator, loop, server.servers[0].sockets[0].getsockname()[1], options)
        finally:
            server.should_exit = True
            loop.join()
    found["cores"] = os.cpu_count()
    print(json.dumps(found, indent=1))
    if options.json is not None:
        earlier = json.loads(options.json.read_text()) if options.json.exists() else []
        options.json.write_text(json.dumps([*earlier, found], indent=1) + "\n")


if __name__ == "__main__":
    main()
