"""Set up everything and run the checks: formatting, lint, types and all tests, in as many processes as there are cores.

python3 scripts/test.py [pytest arguments, such as --long for the long tests too, or -n 0 for a single process]
python3 scripts/test.py --hostile 30m    generates hostile input for that long, where a usual run does for 15 seconds
"""

from __future__ import annotations

import os
import sys

from environment import ROOT, explain_if_asked, prepare, run

SLOWEST = ("--durations=60", "--durations-min=5")


def main() -> None:
    """Run the checks; exit with the status of the first one that fails."""
    explain_if_asked(__doc__)
    programs = prepare("dev")
    # Every process has a core of its own: more threads would only get in each other's way.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"}
    for command in (["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"]):
        run([str(programs / command[0]), *command[1:]], cwd=ROOT)
    run(
        # The slowest are named: what a run takes is theirs.
        [str(programs / "python"), "-m", "pytest", "-n", "auto", "--dist", "worksteal", *SLOWEST, *sys.argv[1:]],
        cwd=ROOT,
        env=environment,
    )


if __name__ == "__main__":
    main()
