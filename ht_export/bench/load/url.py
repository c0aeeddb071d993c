"""`ht-bench load --url`: a server under load that speaks OpenAI's API, ours or another."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from ht_export.bench.bar import bar
from ht_export.bench.load.arrivals import Arrivals
from runtime.checks import number
from runtime.errors import InputError
from runtime.files import write_json
from runtime.program import say

FORMAT, FORMAT_VERSION = "ht-bench-load-url", 1
# Where the key is that the server asks for: not an option, which others on the machine could read.
KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST = 86400.0
# Options that are for an engine of this process.
OF_ENGINES = ("device", "threads", "max_batch", "plot")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for a server."""
    group = parser.add_argument_group(
        "a server, in place of an engine",
        "Texts are asked for one by one first, and then compared with those under load; the exit status is 1 where one "
        f"differs, or a request fails other than by 429. A key is taken from {KEY_VARIABLE}.",
    )
    group.add_argument("--url", metavar="URL", help="any that speaks OpenAI's API, such as http://127.0.0.1:8000/v1")
    group.add_argument("--model", metavar="NAME", help="of the server's (default: the first that it lists)")
    group.add_argument("--seconds", type=float, metavar="S", help="how long each level goes on, in place of --requests")
    group.add_argument(
        "--leave", type=float, default=0.0, metavar="SHARE", help="of the clients leave mid-stream (default: 0)"
    )
    group.add_argument(
        "--extra", default="{}", metavar="JSON", help='more fields of each request, such as {"speculate": false}'
    )


def load(options: argparse.Namespace, patterns: Sequence[Arrivals]) -> int:
    """Measure, print a table, write files; return the exit status. Raises `InputError` for a user's mistake."""
    for name in OF_ENGINES:
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is for an engine, and a server has its own; leave it out")
    from ht_export.bench.load.calling import Caller
    from ht_export.bench.load.served import Plan, run, summarise, to_markdown
    from ht_export.prompts import read_conversations

    extra = {"max_tokens": options.max_new_tokens, "temperature": options.temperature, **_extra(options.extra)}
    if options.temperature:
        extra.setdefault("seed", options.seed)
    seconds = None if options.seconds is None else number("--seconds", options.seconds, 0.1, LONGEST)
    share = number("--leave", options.leave, 0.0, 1.0)
    prompts = read_conversations(options.prompts)
    texts = [prompt.turns[0] for prompt in prompts[: options.requests]]
    caller = Caller(options.url, options.model, os.environ.get(KEY_VARIABLE), extra)
    levels: list[dict[str, Any]] = []
    try:
        alone = []
        with bar("answering alone", options.quiet) as tell:
            for place, text in enumerate(texts, start=1):
                heard = caller.ask(place - 1, text)
                if heard.ending != "whole":
                    raise InputError(f"{options.url} does not answer prompt {prompts[place - 1].id}: {heard.cause}")
                alone.append(heard.text)
                tell(place, len(texts))
        for pattern in patterns:
            print(f"ht-bench: {pattern.name}", file=sys.stderr)
            plan = Plan(max(options.requests, 2 * pattern.clients), seconds, share, options.seed)
            levels.append({"arrivals": pattern.name, **summarise(run(caller, pattern, texts, plan), alone)})
    finally:
        caller.close()
    results = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "conditions": {
            "command": " ".join(["ht-bench", *(shlex.quote(one) for one in options.arguments)]),
            "date": time.strftime("%Y-%m-%d"),
            "url": options.url,
            "model": caller.model,
            "prompts": len(texts),
            "max_new_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "seed": options.seed,
            "leave": share,
            "extra": extra,
        },
        "levels": levels,
    }
    if options.json:
        write_json(options.json, results)
    say(to_markdown(results))
    failed = sum(level["error"] + len(level["other_texts"]) for level in levels)
    if failed:
        print(f"ht-bench: {failed} answers failed, or were other than alone: see above", file=sys.stderr)
    return 1 if failed else 0


def _extra(given: str) -> dict[str, Any]:
    try:
        found = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise InputError(f'--extra must be an object in JSON ({error}), such as {{"speculate": false}}') from error
    if not isinstance(found, dict):
        raise InputError('--extra must be an object in JSON, such as {"speculate": false}')
    return found
