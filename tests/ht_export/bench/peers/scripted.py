"""A peer of the tests: a worker that speaks the protocol, and does what its script says in place of one answer."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

# What a model of which the next token is one more says: the reference has to be the same.
ALPHABET = 200


def main() -> None:
    """Answer on stdout; `sys.argv[1]` names what to do when, such as "answer:dies"."""
    when, _, what = sys.argv[1].partition(":")
    say({"ready": True, "missing": []} if when != "start" else misbehave(what))
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == when:
            say(misbehave(what))
        elif asked["do"] == "choices":
            say({"ok": {"choices": [{}, {"faster": 1}]}})
        elif asked["do"] == "open":
            opened = asked
            say({"ok": {"version": "scripted 1", "about": {}, "peak_bytes": 1}})
        else:
            say({"ok": answers(asked["prompts"], opened)})


def answers(prompts: list[list[int]], opened: dict[str, object]) -> dict[str, object]:
    """Answer each prompt with its last token's successors; faster where the setting says so."""
    tokens = [
        [(prompt[-1] + step) % ALPHABET + 3 for step in range(int(str(opened["max_new_tokens"])))] for prompt in prompts
    ]
    seconds = 1.0 if opened["setting"] else 2.0
    found = [
        {"tokens": one, "text": None, "count": len(one), "first_s": 0.1, "seconds": seconds, "at_first": 1}
        for one in tokens
    ]
    return {"answers": found, "seconds": seconds * len(prompts), "peak_bytes": 5_000_000}


def misbehave(what: str) -> object:
    """Do what a hostile worker does."""
    if what == "dies":
        print("Segmentation fault, as it were", file=sys.stderr)
        os._exit(3)
    if what == "hangs":
        time.sleep(600)
    if what == "closes":
        os.close(1)
        time.sleep(600)
    if what == "floods":
        while True:
            sys.stdout.write("x" * 65536)
    if what == "rubbish":
        sys.stdout.write("\x1b[2J not JSON \udcff".encode("utf-8", "replace").decode() + "\n")
        sys.stdout.flush()
        time.sleep(600)
    return {
        "list": [],
        "nothing": {},
        "missing": {"ready": False, "missing": ["the_library"]},
        "error": {"error": "ValueError: it does not like this\nand says so at length"},
        "empty": {"ok": {}},
        "few": {"ok": {"answers": [], "seconds": 1.0, "peak_bytes": 1}},
        "negative": {"ok": {"answers": [{"count": -1}], "seconds": 1.0, "peak_bytes": 1}},
        "choices": {"ok": {"choices": "none"}},
    }[what]


def say(value: object) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def command(script: str) -> list[str]:
    """Return how a worker of this script is started."""
    return [sys.executable, str(Path(__file__)), script]


if __name__ == "__main__":
    main()
