"""`ht-serve`: an engine behind OpenAI's API."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import InputError, InputWarning
from runtime.options import Parser
from runtime.program import pathname, run
from runtime.serving import INSTALL, NEEDED

if TYPE_CHECKING:
    from runtime.generator import Generator
    from runtime.serving.settings import Settings

HOST, PORT = "127.0.0.1", 8000
KEYS_VARIABLE = "HT_API_KEYS"
LOG_LEVELS = ("debug", "info", "warning", "error")
ESCAPES = ("messages", "all", "none")
TOOL_PARSERS = ("auto", "hermes", "llama3", "mistral", "none")
MAX_QUEUE = 128
DESCRIPTION = """\
Serve an engine by OpenAI's API: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, each streamed or not.
Many requests share each pass of the engine, and each has the text that it has alone. What a request asks for and cannot
have is refused with an error that says so; docs/serving.md has every field.
"""
EPILOG = """\
examples:
  ht-serve engine.onnx                            an engine made by ht-export, for this machine alone
  ht-serve smollm2-135m                           a known model, exported the first time (one minute)
  ht-serve engine.onnx --host 0.0.0.0 --api-key-file keys.txt --served-model-name my-model

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

Every option may also be given as a variable of the environment, --max-batch as HT_SERVE_MAX_BATCH; the command
line goes first. Keys are in a file, or in HT_API_KEYS, separated by commas.

It listens at once when the engine is loaded, and is ready (/health/ready) when that is warm. SIGTERM, or Ctrl-C, lets
requests under way end, for up to --drain-s seconds; a second one does not. TLS is for a proxy in front.
"""


def build_parser() -> Parser:
    """Return the parser of `ht-serve`."""
    parser = Parser(
        prog="ht-serve",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("engine", help="engine file (.onnx or .plan), or a known model such as smollm2-135m")
    parser.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name of the model in requests; may repeat (default: the model's own, or the one that was given)",
    )
    parser.add_argument(
        "--precision", metavar="P", help="of a known model that is exported: fp32, int8, int4 (default: fp32)"
    )
    _add_listening(parser.add_argument_group("listening"))
    _add_engine(parser.add_argument_group("engine"))
    _add_limits(parser.add_argument_group("limits", "What is beyond one is refused at once, with a status of its own."))
    _add_operation(parser.add_argument_group("operation"))
    return parser


def _add_listening(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", default=HOST, help=f"address to listen at (default: {HOST}, this machine alone; 0.0.0.0 for all)"
    )
    group.add_argument("--port", type=int, default=PORT, metavar="N", help=f"default: {PORT}; 0 for any that is free")
    group.add_argument(
        "--api-key-file",
        type=pathname,
        metavar="FILE",
        help="keys of which each request to /v1 must have one, one a line (default: HT_API_KEYS, else none are needed)",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        help="web page that may call this from a browser, such as https://example.org; may repeat (default: none)",
    )
    group.add_argument(
        "--no-playground", action="store_true", help="no page at /, which chats and shows how texts come"
    )


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", help="where an .onnx engine runs: cpu, cuda, cuda:1 (default: cpu)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all physical cores)")
    group.add_argument("--max-batch", type=int, default=16, metavar="N", help="requests that run at once (default: 16)")
    group.add_argument(
        "--max-stall-ms",
        type=float,
        default=200.0,
        metavar="MS",
        help="how long a long prompt may keep others waiting, each time (default: 200)",
    )
    group.add_argument("--cache-bytes", type=int, metavar="N", help="memory of keys and values (default: a quarter)")
    group.add_argument(
        "--prefix-cache-bytes",
        type=int,
        metavar="N",
        help="of it, for prompts that begin alike; 0 for none (default: a quarter)",
    )
    group.add_argument("--gpu-memory-bytes", type=int, metavar="N", help="the same on a GPU, in place of --cache-bytes")
    group.add_argument(
        "--text-pool",
        type=int,
        default=0,
        metavar="N",
        help="keep up to N tokens of finished answers, to draft those of others from; how fast a text comes may tell "
        "that somebody had it before (default: 0, none)",
    )
    group.add_argument(
        "--no-adapt", action="store_true", help="keep the engine's own tree sizes, and measure nothing at first load"
    )
    group.add_argument(
        "--escape",
        choices=ESCAPES,
        default="messages",
        help="where text never becomes special tokens, as <|im_end|>: messages (default), all (completions too), none",
    )

    group.add_argument(
        "--tool-parser",
        choices=TOOL_PARSERS,
        default="auto",
        help="how the model writes calls of tools (default: auto, what its chat template shows); none refuses tools",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-queue", type=int, default=MAX_QUEUE, metavar="N", help=f"requests that wait (default: {MAX_QUEUE}): 429"
    )
    group.add_argument(
        "--max-body", type=int, default=4 << 20, metavar="BYTES", help="of a request (default: 4194304): 413"
    )
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="new tokens of an answer (default: the context limit): 400"
    )
    group.add_argument(
        "--max-answers", type=int, default=128, metavar="N", help="n times prompts of a request (default: 128): 400"
    )
    group.add_argument(
        "--max-streams", type=int, default=512, metavar="N", help="answers streamed at once (default: 512): 429"
    )
    group.add_argument(
        "--body-s", type=float, default=30.0, metavar="S", help="for a request to come (default: 30): 408, or cut off"
    )
    group.add_argument(
        "--reader-s",
        type=float,
        default=30.0,
        metavar="S",
        help="for a client to read what was sent (default: 30): cut off",
    )


def _add_operation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--drain-s", type=float, default=30.0, metavar="S", help="for requests under way, at the end (default: 30)"
    )
    group.add_argument(
        "--metrics-prefix", default="ht_", metavar="P", help="of metrics (default: ht_); vllm: for vLLM's own names"
    )
    group.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="default: info")
    group.add_argument(
        "--log-texts", action="store_true", help="write what is asked and answered into the log (default: never)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-serve` and return its exit status: 0, or with one line on stderr 1 for a user's mistake, and 2 for a
    model that nobody knows, as for an option that there is not.
    """
    return run("ht-serve", lambda: _serve(_parsed(arguments)), interrupted="interrupted")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line, and of the environment where it has none."""
    parser = build_parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    return parser.parse_args([*_from_environment(parser), *given])


def _from_environment(parser: argparse.ArgumentParser) -> list[str]:
    found = []
    for action in parser._actions:
        option = next((name for name in action.option_strings if name.startswith("--")), None)
        if option is None or option in ("--help", "--print-completion"):
            continue
        value = os.environ.get(f"HT_SERVE_{option.removeprefix('--').replace('-', '_').upper()}")
        if not value:
            continue
        if action.nargs == 0:
            if value.lower() not in ("0", "false", "no"):
                found.append(option)
        else:
            found.append(f"{option}={value}")
    return found


def _serve(options: argparse.Namespace) -> int:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{missing[0]} is not installed; install it with: {INSTALL}")
    from runtime.serving.app import create_app
    from runtime.serving.exporting import UnknownModelError, engine_of
    from runtime.serving.logs import configure
    from runtime.serving.running import bound, serve

    if not 0 <= options.port < 1 << 16:
        raise InputError(f"--port must be 0 to 65535, not {options.port}")
    settings = settings_of(options)
    _warn_of_strangers(options.host, bool(settings.api_keys))
    configure(options.log_level)
    # An address that is taken is told before the engine is loaded.
    with bound(options.host, options.port) as listening:
        try:
            engine = engine_of(options.engine, options.precision)
        except UnknownModelError as error:
            print(f"ht-serve: error: {error}", file=sys.stderr)
            return 2
        with _generator(engine, options) as generator:
            serve(create_app(generator, settings), listening)
    return 0


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings that the options of `ht-serve` ask for. Raises `InputError` where they do not fit."""
    from runtime.bundle.places import ENGINE_SUFFIXES
    from runtime.serving.settings import Settings

    # A model that was asked for by name is known by that.
    own = () if Path(options.engine).suffix in ENGINE_SUFFIXES or Path(options.engine).exists() else (options.engine,)
    return Settings(
        models=options.served_model_name or own,
        api_keys=_keys(options.api_key_file),
        max_body=options.max_body,
        max_tokens=options.max_tokens,
        max_answers=options.max_answers,
        max_streams=options.max_streams,
        body_s=options.body_s,
        reader_s=options.reader_s,
        drain_s=options.drain_s,
        escape=options.escape,
        cors_origins=options.cors_origin or (),
        metrics_prefix=options.metrics_prefix,
        log_texts=options.log_texts,
        tools=options.tool_parser != "none",
        playground=not options.no_playground,
    )


def _keys(path: Path | None) -> list[str]:
    from runtime.serving.keys import checked_keys, read_keys

    if path is not None:
        return read_keys(path)
    given = os.environ.get(KEYS_VARIABLE)
    if given is None:
        return []
    # One that is set and empty is a mistake that would open the server to all.
    return checked_keys([key.strip() for key in given.split(",") if key.strip()], KEYS_VARIABLE)


def _warn_of_strangers(host: str, keys: bool) -> None:
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and not keys:
        warnings.warn(
            f"anybody who reaches {host} can use this server; give --api-key-file, or let a proxy ask for keys",
            InputWarning,
            stacklevel=2,
        )


def _generator(engine: Path, options: argparse.Namespace) -> Generator:
    from runtime.generator import Generator

    return Generator(
        engine,
        device=options.device,
        threads=options.threads,
        tool_format=None if options.tool_parser in ("auto", "none") else options.tool_parser,
        adapt=not options.no_adapt,
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        max_stall_ms=options.max_stall_ms,
        cache_bytes=options.cache_bytes,
        prefix_cache_bytes=options.prefix_cache_bytes,
        gpu_memory_bytes=options.gpu_memory_bytes,
        text_pool_tokens=options.text_pool,
    )


if __name__ == "__main__":
    sys.exit(main())
