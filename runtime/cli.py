"""`ht-generate`: text from an exported engine, with how it came about."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.command_line import run


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `ht-generate`."""
    parser = argparse.ArgumentParser(
        prog="ht-generate",
        description="Generate text with an exported engine by draft-and-verify decoding. The text is exactly that of "
        "plain decoding (--plain); only the number of engine passes differs.",
        epilog='example: ht-generate engine.onnx "Why is the sky blue?" --max-new-tokens 128',
    )
    parser.add_argument("engine", type=Path, help="engine file made by ht-export (.onnx or .plan)")
    parser.add_argument("prompt", help="the user's message, put into the model's chat template; '-' reads stdin")
    parser.add_argument("--raw", action="store_true", help="use the prompt as it is, without the chat template")
    parser.add_argument("--plain", action="store_true", help="decode one token a pass, without speculation")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming the text")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may repeat")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where an .onnx engine runs (default: cpu; a .plan runs on the GPU)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all physical cores)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-generate` and return its exit status: 0, or 1 with one line on stderr for a user's mistake."""
    options = build_parser().parse_args(arguments)
    return run("ht-generate", lambda: _generate(options), interrupted="interrupted")


def _generate(options: argparse.Namespace) -> None:
    from runtime.generator import Generator

    generator = Generator(options.engine, device=options.device, threads=options.threads)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    arguments = {
        "max_new_tokens": options.max_new_tokens,
        "stop": options.stop,
        "speculate": not options.plain,
        "raw": options.raw,
    }
    if options.json:
        print(json.dumps(generator.generate(prompt, **arguments).to_dict(), ensure_ascii=False))
        return
    for chunk in generator.stream(prompt, **arguments):
        print(chunk.text, end="", flush=True)
        result = chunk.result
    assert result is not None
    print(
        f"\n\n{len(result.tokens)} tokens ({result.finish_reason}), {result.steps} steps, "
        f"{result.tokens_per_step:.2f} tokens per step, {result.decode_tokens_per_second:.1f} tokens/s, "
        f"first token after {result.time_to_first_token_s * 1000:.0f} ms",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
