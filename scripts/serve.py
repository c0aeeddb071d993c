"""Set up everything, export SmolLM2-135M with its transfer layers, and serve it by OpenAI's API on this machine.

python3 scripts/serve.py [options of ht-serve, such as --port 8001]
"""

from __future__ import annotations

import os
import sys

from environment import explain_if_asked, prepare


def main() -> None:
    """Become `ht-serve`."""
    explain_if_asked(__doc__)
    program = str(prepare("export,serve") / "ht-serve")
    sys.stdout.flush()
    # In the place of this process: signals are for the server.
    os.execv(program, [program, "smollm2-135m", *sys.argv[1:]])


if __name__ == "__main__":
    main()
