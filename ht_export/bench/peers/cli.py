"""`ht-bench peers`: an engine beside llama.cpp, OpenVINO GenAI, ONNX Runtime GenAI and `transformers`."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ht_export.bench.peers.kinds import ENGINE_PRECISIONS, KINDS, OURS, PRECISIONS, TRANSFORMERS, server
from runtime.checks import LARGEST, MOST_REPEATS, MOST_THREADS, cores, number, whole
from runtime.errors import InputError, shown
from runtime.files import check_writable, sha256_file
from runtime.program import add_model, integers, pathname, say

if TYPE_CHECKING:
    from ht_export.bench.peers.measure import Contestant, Work
    from ht_export.bench.peers.models import Forms
    from ht_export.prompts import Conversation

CLIENTS = (1, 8)
MOST_CLIENTS = 256
LONGEST = 86400.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ht-bench peers`."""
    parser.description = (
        "Answer the same prompts, as token ids, by our engine and by other software on this machine, each in a process "
        "of its own, in turns, with its own best settings: tokens/s, time to the first token, memory, loading, files, "
        "and which texts are the float32 model's own. A peer that is not installed is told of and left out, one that "
        "fails is told of, and the others go on. Killed at any point, the same command with --json continues."
    )
    parser.epilog = (
        "examples: ht-bench peers smollm2-135m --prompts prompts.jsonl --work peers --json peers.json; "
        "ht-bench peers smollm2-135m --prompts prompts.jsonl --work peers --python openvino=/opt/ov/bin/python "
        "--url vllm=http://127.0.0.1:8000/v1"
    )
    parser.set_defaults(work=peers, interrupted="interrupted; with --json, run the same command again to continue")
    add_model(parser)
    parser.add_argument(
        "--prompts", type=pathname, required=True, metavar="FILE", help="JSON lines with 'prompt' or 'turns'"
    )
    # Not `work`, which is what the subcommand does.
    parser.add_argument(
        "--work", dest="folder", type=pathname, required=True, metavar="DIR", help="keep converted models here"
    )
    parser.add_argument("--json", type=pathname, metavar="FILE", help="write results here, after each measurement")
    parser.add_argument("--plot", type=pathname, metavar="FILE", help="draw them here, as a PNG file")
    _add_what(parser.add_argument_group("what is compared"))
    _add_how(parser.add_argument_group("how"))


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--peers", type=_names, default=tuple(KINDS), metavar="A,B", help=f"of {', '.join(KINDS)} (default: all)"
    )
    group.add_argument(
        "--precisions",
        type=_names,
        default=PRECISIONS,
        metavar="A,B",
        help=f"of {', '.join(PRECISIONS)} (default: all)",
    )
    group.add_argument(
        "--engine",
        type=pathname,
        action="append",
        default=[],
        metavar="ENGINE",
        help="our engine in one of the precisions, repeat for more (default: exported into --work)",
    )
    group.add_argument("--transfer", type=pathname, metavar="FILE", help="transfer layers for what is exported")
    group.add_argument(
        "--gguf", type=pathname, metavar="FILE", help="the same weights as a GGUF file, where the model is none"
    )
    group.add_argument(
        "--python",
        type=_named,
        action="append",
        default=[],
        metavar="PEER=PYTHON",
        help="run a peer by the Python of another environment; may repeat",
    )
    group.add_argument(
        "--url",
        type=_named,
        action="append",
        default=[],
        metavar="NAME=URL",
        help="also measure a server that speaks OpenAI's API, such as vLLM or SGLang; may repeat",
    )


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--count", type=int, metavar="N", help="use at most N prompts, evenly from the file (default: all)"
    )
    group.add_argument("--max-new-tokens", type=int, default=96, metavar="N", help="default: 96")
    group.add_argument(
        "--clients", type=integers, default=CLIENTS, metavar="N,N", help="so many at once, each in turn (default: 1,8)"
    )
    group.add_argument("--rounds", type=int, default=3, metavar="N", help="of all peers in turns (default: 3)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of each (default: all cores)")
    group.add_argument(
        "--trial",
        type=int,
        default=3,
        metavar="N",
        help="prompts, others where there are, to try settings on (default: 3)",
    )
    group.add_argument(
        "--limit",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds a peer has for each prompt, and to load (default: 600)",
    )
    group.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="begin nothing after so long; the same command goes on (default: no end)",
    )


def peers(options: argparse.Namespace) -> int:
    """Measure, print tables, write files; return the exit status. Raises `InputError` for a user's mistake."""
    _check(options)
    from ht_export.bench.peers.measure import OutOfTimeError, measure, reference
    from ht_export.bench.peers.models import prepare
    from ht_export.bench.peers.process import PeerError
    from ht_export.bench.peers.results import opened
    from ht_export.bench.peers.table import to_markdown
    from ht_export.prompts import evenly, read_conversations

    conversations = read_conversations(options.prompts)
    chosen = evenly(conversations, options.count or len(conversations))
    forms = prepare(options.model, options.folder, options.gguf, options.transfer)
    contestants = _contestants(options, forms)
    threads = options.threads or cores()
    results = opened(options.json, _conditions(options, forms, chosen, threads, contestants))
    work = _work(options, forms, conversations, chosen, threads)
    try:
        reference(work, results, dict(options.python).get(TRANSFORMERS.name))
        measure(work, results, contestants)
        results.complete = not results.failed
    except OutOfTimeError:
        pass
    except PeerError as error:
        # Of the reference.
        raise InputError(f"the float32 model's texts cannot be had: {error.cause}") from error
    results.write()
    say(to_markdown(results))
    if options.plot and results.rows:
        from ht_export.bench.peers.plot import plot

        plot(results, options.plot)
    return 0


def _work(
    options: argparse.Namespace,
    forms: Forms,
    conversations: Sequence[Conversation],
    chosen: Sequence[Conversation],
    threads: int,
) -> Work:
    from transformers import AutoTokenizer

    from ht_export.bench.peers.measure import Work
    from ht_export.prompts import encode_chat, evenly

    tokenizer = AutoTokenizer.from_pretrained(forms.checkpoint, local_files_only=True, trust_remote_code=False)
    others = [one for one in conversations if one not in chosen] or list(chosen)
    encoded, trial = (
        [encode_chat(tokenizer, one.turns[:1]) for one in some] for some in (chosen, evenly(others, options.trial))
    )
    for one, ids in zip(chosen, encoded, strict=True):
        if len(ids) + options.max_new_tokens > forms.about.max_context:
            raise InputError(
                f"prompt {one.id} has {len(ids)} tokens, and {forms.about.max_context} are allowed with its answer of "
                f"up to {options.max_new_tokens}; leave it out, or give a smaller --max-new-tokens"
            )
    used = {token for ids in [*encoded, *trial] for token in ids} | set(forms.about.stop_tokens)
    return Work(
        prompts=encoded,
        trial=[ids for ids in trial if len(ids) + options.max_new_tokens <= forms.about.max_context] or encoded,
        forms=forms,
        threads=threads,
        max_new_tokens=options.max_new_tokens,
        clients=options.clients,
        rounds=options.rounds,
        limit=options.limit,
        seconds=options.seconds,
        pad_token=next((token for token in range(forms.about.vocabulary) if token not in used), 0),
        decode=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
    )


def _contestants(options: argparse.Namespace, forms: Forms) -> list[Contestant]:
    from ht_export.bench.peers.measure import Contestant

    pythons = dict(options.python)
    engines = _engines(options.engine, forms)
    found = []
    for precision in options.precisions:
        for name in options.peers:
            kind = KINDS[name]
            given = engines.get(precision) if kind is OURS else None
            if given is not None or (precision in kind.forms and not (kind is OURS and engines)):
                found.append(Contestant(f"{name} {precision}", kind, precision, pythons.get(name), given=given))
    found += [Contestant(name, server(name), "its own", address=address) for name, address in options.url]
    return found


def _engines(paths: Sequence[Path], forms: Forms) -> dict[str, Path]:
    """Return the engines that are given by precision. Raises `InputError` for one of other weights."""
    from runtime.bundle.engine_file import read_engine_file

    found: dict[str, Path] = {}
    for path in paths:
        about = read_engine_file(path)
        precision = ENGINE_PRECISIONS.get(about.precision)
        if precision is None or precision in found:
            raise InputError(
                f"--engine {path} is of precision {about.precision}; give one engine each of "
                f"{', '.join(ENGINE_PRECISIONS)}"
            )
        if about.base_model["weights_sha256"] != forms.about.weights_sha256:
            raise InputError(
                f"--engine {path} was made from {about.base_model['name']} "
                f"({about.base_model['weights_sha256'][:12]}), and the model has other weights "
                f"({forms.about.weights_sha256[:12]}); give an engine of that model"
            )
        found[precision] = path
    return found


def _conditions(
    options: argparse.Namespace,
    forms: Forms,
    chosen: Sequence[Conversation],
    threads: int,
    contestants: Sequence[Contestant],
) -> dict[str, Any]:
    from ht_export.bench.conditions import commit, without_folders
    from runtime.tuning import cpu_name

    return {
        "command": " ".join(["ht-bench", *(shlex.quote(without_folders(one)) for one in options.arguments)]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "model": forms.about.name,
        "weights_sha256": forms.about.weights_sha256,
        "device": cpu_name(threads),
        "threads": threads,
        "prompts": {
            "file": options.prompts.name,
            "sha256": sha256_file(options.prompts),
            "count": len(chosen),
            "trial": options.trial,
        },
        "max_new_tokens": options.max_new_tokens,
        "rounds": options.rounds,
        "clients": list(options.clients),
        "contestants": [contestant.name for contestant in contestants],
    }


def _check(options: argparse.Namespace) -> None:
    """Raise `InputError` for what would be missed only after a long time."""
    for option, given, allowed in (
        ("--peers", options.peers, tuple(KINDS)),
        ("--precisions", options.precisions, PRECISIONS),
        ("--python", [name for name, _ in options.python], tuple(KINDS)),
    ):
        for name in given:
            if name not in allowed:
                raise InputError(f"{option}: there is no {shown(name)}; choose from {', '.join(allowed)}")
    for name, _ in options.url:
        if name in KINDS or [one for one, _ in options.url].count(name) > 1:
            raise InputError(f"--url {name}=...: the name is taken; choose another")
    for count in options.clients:
        whole("--clients", count, 1, MOST_CLIENTS)
    for option, value, most in (
        ("--count", options.count, LARGEST),
        ("--max-new-tokens", options.max_new_tokens, LARGEST),
        ("--rounds", options.rounds, MOST_REPEATS),
        ("--threads", options.threads, MOST_THREADS),
        ("--trial", options.trial, MOST_REPEATS),
    ):
        if value is not None:
            whole(option, value, 1, most)
    number("--limit", options.limit, 0.1, LONGEST)
    if options.seconds is not None:
        number("--seconds", options.seconds, 0.0, LONGEST)
    for path in (options.json, options.plot):
        if path is not None:
            check_writable(path)
    missing = [name for name in ("torch", "transformers", "gguf") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"ht-bench peers needs {' and '.join(missing)}; install hidden-transfer[bench]")
    if options.plot is not None and not importlib.util.find_spec("matplotlib"):
        raise InputError("--plot needs matplotlib; install hidden-transfer[bench], or leave it out")


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _named(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    return name, value
