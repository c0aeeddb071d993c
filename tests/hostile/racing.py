"""Run by `test_placing.py`: installs an engine again and again, where others may be doing the same.

python -m tests.hostile.racing NEW ENGINE TIMES: prints how many times it was done.
"""

from __future__ import annotations

import sys
from pathlib import Path

from runtime.errors import InputError
from tests.hostile.killed import install


def main() -> None:
    """Install, and try again where another install is at work."""
    new, engine, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    done = 0
    while done < times:
        try:
            install(new, engine)
        except InputError as error:
            if "another export to" not in str(error):
                raise
            continue
        done += 1
    print(done)


if __name__ == "__main__":
    main()
