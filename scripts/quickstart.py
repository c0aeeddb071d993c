"""Set up everything, export SmolLM2-135M with its transfer layers, and generate text by draft-and-verify.

python3 scripts/quickstart.py ["your question"]
"""

from __future__ import annotations

import sys

from environment import ROOT, prepare, run

PROMPT = "Explain in a few sentences why the sky is blue and sunsets are red."


def main() -> None:
    """Run the quickstart."""
    prompt = sys.argv[1] if len(sys.argv) > 1 else PROMPT
    programs = prepare("export")
    engine = ROOT / "build" / "smollm2-135m" / "engine.onnx"
    if not engine.with_suffix(".json").is_file():
        run([str(programs / "ht-export"), "smollm2-135m", "--out", str(engine)])
    print(f"\n> {prompt}\n", flush=True)
    run([str(programs / "ht-generate"), str(engine), prompt, "--max-new-tokens", "128"])


if __name__ == "__main__":
    main()
