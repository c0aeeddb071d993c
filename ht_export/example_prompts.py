"""Write prompts to try `ht-train` with: everyday questions over a list of topics, in the format that it reads.

python -m ht_export.example_prompts OUT.jsonl HELD_OUT.jsonl

The two files share no topic. Real use wants thousands of prompts such as your own users write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

QUESTIONS = {
    "explain": "Explain {} to a ten-year-old.",
    "list": "List five facts about {}.",
    "story": "Write a short story in which {} plays a part.",
    "advice": "What should a beginner know about {}?",
    "compare": "What do people often get wrong about {}?",
    "history": "How has {} changed over the last hundred years?",
    "poem": "Write a poem of eight lines about {}.",
    "code": "Write a Python class that models {}, with two methods.",
}
TOPICS = (
    "bread baking", "the moon", "bicycles", "bees", "chess", "rivers", "public libraries", "tea", "earthquakes",
    "gardening", "trains", "sleep", "volcanoes", "photography", "whales", "glass", "maps", "football", "clouds",
    "money", "a weather station", "shoes", "the violin", "recycling", "spices", "castles", "dreams", "batteries",
    "sheep", "ice", "a lighthouse", "paper", "swimming", "the number zero", "bridges", "owls", "soap", "windmills",
    "puppets", "salt",
)  # fmt: skip
HELD_OUT_TOPICS = ("coffee", "mountains", "robots", "cats", "radio")


def main() -> int:
    """Write both files."""
    if len(sys.argv) != 3:
        print("usage: python -m ht_export.example_prompts OUT.jsonl HELD_OUT.jsonl", file=sys.stderr)
        return 2
    for path, count in write_examples(Path(sys.argv[1]), Path(sys.argv[2])).items():
        print(f"{path}: {count} prompts")
    return 0


def write_examples(prompts: Path, held_out: Path) -> dict[Path, int]:
    """Write both files; return how many prompts each has."""
    counts = {}
    for path, topics in ((prompts, TOPICS), (held_out, HELD_OUT_TOPICS)):
        rows = [
            {"id": f"{topic}: {task}", "task": task, "prompt": question.format(topic)}
            for topic in topics
            for task, question in QUESTIONS.items()
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        counts[path] = len(rows)
    return counts


if __name__ == "__main__":
    sys.exit(main())
