"""Set up everything, export SmolLM2-135M with its transfer layers, and answer a question plainly and speculatively.

python3 scripts/quickstart.py ["your question"]
"""

from __future__ import annotations

import sys

from environment import ROOT, explain_if_asked, prepare, run

PROMPT = "Explain in a few sentences why the sky is blue and sunsets are red."
NEXT = """
Next:
  python3 scripts/quickstart.py "a question of your own"
      the same engine, in a few seconds
  python3 scripts/serve.py
      OpenAI's API, and a page that shows each pass
  {programs}/ht-export MODEL --random-transfer --out mine/engine.onnx
      your own checkpoint (a folder, a .gguf file or a hub id); docs/training.md makes it fast
"""


def main() -> None:
    """Run the quickstart."""
    explain_if_asked(__doc__)
    prompt = sys.argv[1] if len(sys.argv) > 1 else PROMPT
    programs = prepare("export")
    engine = ROOT / "build" / "smollm2-135m" / "engine.onnx"
    if not engine.with_suffix(".json").is_file():
        run([str(programs / "ht-export"), "smollm2-135m", "--out", str(engine)])
    print(f"\n> {prompt}\n", flush=True)
    run([str(programs / "python"), str(ROOT / "examples" / "compare.py"), str(engine), prompt])
    print(NEXT.format(programs=programs), end="")


if __name__ == "__main__":
    main()
