"""The walkthrough of docs/training.md, command by command, with a tiny model and small numbers."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
GUIDE = ROOT / "docs" / "training.md"
SMALL = {
    "--max-prompts": "8",
    "--max-new-tokens": "24",
    "--batch-size": "8",
    "--steps": "4",
    "--sequences": "2",
    "--anchors": "8",
    "--layers": "2,2,2",
    "--evaluate-every": "2",
}


def commands() -> list[str]:
    walkthrough = GUIDE.read_text(encoding="utf-8").split("## Walkthrough", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```bash\n(.*?)```", walkthrough, flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in joined.splitlines() if line.strip()]


def in_small(words: list[str], checkpoint: Path) -> list[str]:
    small = [str(checkpoint) if word == "smollm2-135m" else word for word in words]
    for index, word in enumerate(small[:-1]):
        if word in SMALL:
            small[index + 1] = SMALL[word]
    return small


def test_every_command_of_the_walkthrough_works(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {
        "ht-train": ["-m", "ht_export.training.cli"],
        "ht-export": ["-m", "ht_export.cli"],
        "ht-generate": ["-m", "runtime.cli"],
        "python": [],
    }
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in commands():
        program, *words = shlex.split(command)
        if program == "pip":
            continue
        words = in_small(words, tiny_checkpoint)
        if program == "ht-train" and program in ran:
            # Its first command had a process of its own; the others go where torch is loaded already.
            assert importlib.import_module(modules[program][1]).main(words) == 0, command
            continue
        ran.append(program)
        done = subprocess.run(
            [sys.executable, *modules[program], *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            pytest.fail(f"{command}\n{done.stderr}")
        if program == "python":
            # Eight prompts are enough to see that each command works.
            for name in ("prompts.jsonl", "held-out.jsonl"):
                (tmp_path / name).write_text("".join((tmp_path / name).read_text().splitlines(keepends=True)[:8]))
    assert {"ht-train", "ht-export", "ht-generate"} <= set(ran)
    assert "tokens per step" in done.stderr
