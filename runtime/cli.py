"""`ht-generate`: text from an exported engine, with how it came about."""

from __future__ import annotations

import argparse
import codecs
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError
from runtime.options import Parser
from runtime.program import pathname, run

if TYPE_CHECKING:
    from runtime.sampling import Sampling

# Characters that are read of a prompt on stdin: more than any model's context has room for.
MOST_STDIN = 2**26


def build_parser() -> Parser:
    """Return the parser of `ht-generate`."""
    parser = Parser(
        prog="ht-generate",
        description="Generate text with an exported engine by draft-and-verify decoding. With a float32 engine the "
        "text is that of plain decoding (--plain), in fewer passes; docs/exactness.md has what other precisions "
        "promise.",
        epilog='example: ht-generate engine.onnx "Why is the sky blue?" --temperature 0.8 --top-p 0.95 --seed 7',
    )
    parser.add_argument("engine", type=pathname, help="engine file made by ht-export (.onnx or .plan)")
    parser.add_argument("prompt", help="the user's message, put into the model's chat template; '-' reads stdin")
    parser.add_argument("--raw", action="store_true", help="use the prompt as it is, without the chat template")
    parser.add_argument(
        "--escape-special-tokens",
        action="store_true",
        help="take special tokens that the prompt spells out, such as <|im_end|>, for the text that they are",
    )
    parser.add_argument("--plain", action="store_true", help="decode one token a pass, without speculation")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming the text")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="of the answer, at most (default: 256)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may repeat")
    parser.add_argument(
        "--device",
        help="where an .onnx engine runs: cpu, cuda, cuda:1 (default: cpu; a .plan runs on the GPU)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all physical cores)")
    _add_sampling(parser)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling",
        "How each token is chosen; greedily unless --temperature is given. The options act in the order --logit-bias, "
        "penalties, --ban, --min-new-tokens, --force, --temperature, --top-k, --top-p, --min-p. With the same seed, "
        "--plain gives the same text.",
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (greedy, the default), or 0.01 to 100: sample"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the most probable tokens that together have probability P"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens at least P times as probable as the best one"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: make tokens of prompt and answer less likely, by a factor on their logits (default: 1)",
    )
    group.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="subtract X from the logits of the answer's tokens (default: 0)",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="subtract X from them for each time that they have come (default: 0)",
    )
    group.add_argument(
        "--logit-bias",
        type=_token_and_bias,
        action="append",
        default=[],
        metavar="TOKEN=X",
        help="add X to the logit of the token with this id; may repeat",
    )
    group.add_argument(
        "--ban", type=int, action="append", default=[], metavar="TOKEN", help="never choose this token; may repeat"
    )
    group.add_argument(
        "--force",
        type=_index_and_token,
        action="append",
        default=[],
        metavar="INDEX=TOKEN",
        help="choose this token as new token INDEX, from 0; may repeat",
    )
    group.add_argument(
        "--min-new-tokens", type=int, default=0, metavar="N", help="no end of text before N new tokens (default: 0)"
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="0 to 2**64 - 1: draw the same again (default: a new one, which is printed)",
    )
    group.add_argument(
        "--logprobs",
        type=int,
        default=0,
        metavar="N",
        help="with --json: the log-probabilities of each token and of the N best in its place (default: 0, none)",
    )


def _token_and_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a token and a number such as 42=-5.5") from None


def _index_and_token(text: str) -> tuple[int, int]:
    index, _, token = text.partition("=")
    try:
        return int(index), int(token)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an index and a token such as 0=42") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-generate` and return its exit status: 0, or 1 with one line on stderr for a user's mistake."""
    return run("ht-generate", lambda: _generate(build_parser().parse_args(arguments)), interrupted="interrupted")


def sampling_of(options: argparse.Namespace) -> Sampling:
    """Return what the sampling options of `ht-generate` ask for. Raises `InputError` where they do not fit."""
    from runtime.sampling import Sampling

    if options.logprobs and not options.json:
        raise InputError("--logprobs is for --json; add it, or leave --logprobs out")
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=_once("--logit-bias", options.logit_bias),
        banned_tokens=options.ban,
        forced_tokens=_once("--force", options.force),
        min_new_tokens=options.min_new_tokens,
        seed=options.seed,
        logprobs=options.logprobs,
    )


def _once(option: str, pairs: Sequence[tuple[int, Any]]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{option} has {key}={found[key]} and {key}={value}; leave one of them out")
        found[key] = value
    return found


def _from_stdin() -> str:
    if sys.stdin is None:
        raise InputError("stdin is closed; give the prompt as an argument, or on stdin")
    try:
        text = sys.stdin.read(MOST_STDIN + 1)
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt on stdin is not {sys.stdin.encoding} text ({error.reason}); convert it"
        ) from error
    if len(text) > MOST_STDIN:
        raise InputError(f"the prompt on stdin has more than {MOST_STDIN} characters; shorten it")
    return text


def _generate(options: argparse.Namespace) -> None:
    from runtime.generator import Generator

    sampling = sampling_of(options)
    generator = Generator(options.engine, device=options.device, threads=options.threads)
    prompt = _from_stdin() if options.prompt == "-" else options.prompt
    arguments = {
        "max_new_tokens": options.max_new_tokens,
        "stop": options.stop,
        "speculate": not options.plain,
        "raw": options.raw,
        "sampling": sampling,
        "escape_special_tokens": options.escape_special_tokens,
    }
    if options.json:
        found = generator.generate(prompt, **arguments).to_dict()
        # Where stdout lacks a character JSON has an escape for it.
        every = codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf")
        print(json.dumps(found, ensure_ascii=not every))
        return
    for chunk in generator.stream(prompt, **arguments):
        print(chunk.text, end="", flush=True)
        result = chunk.result
    assert result is not None
    print(
        f"\n\n{len(result.tokens)} tokens ({result.finish_reason}), {result.steps} steps, "
        f"{result.tokens_per_step:.2f} tokens per step, {result.decode_tokens_per_second:.1f} tokens/s, "
        f"first token after {result.time_to_first_token_s * 1000:.0f} ms"
        + ("" if result.seed is None else f", seed {result.seed}"),
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
