"""Answers to prompts by `ht-train data` and by `transformers.generate` in batches: tokens/s, and which are the same.

python docs/measuring/answers.py MODEL --prompts FILE --work DIR --engine NAME=ENGINE [--engine NAME=ENGINE ...]
    [--count 128] [--parts 2] [--max-new-tokens 128] [--batch 32] [--threads 2] [--json FILE]

The ways take turns, part by part of the prompts, in one process; loading is not counted, tokens are those of answers.
A batch of `transformers` has prompts of like length, padded on the left, and ends when all of its answers have.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from ht_export.model.checkpoint import load_base_model
from ht_export.training.data import read_data
from ht_export.training.generate import DataSettings, Part, generate_data
from runtime import Generator
from runtime.files import write_json
from runtime.tuning import cpu_name


@dataclass
class Way:
    """What one way took so far, and the answers it gave."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    answers: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Tokens of answers per second."""
        return sum(self.tokens) / sum(self.seconds)


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="a new folder for the answers")
    parser.add_argument(
        "--engine", action="append", required=True, metavar="NAME=ENGINE", help="an engine of the model"
    )
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="prompts that run at once, in each way")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    engines = dict(item.split("=", 1) for item in arguments.engine)
    base = load_base_model(arguments.model, torch.float32)
    generators = {
        name: Generator(path, threads=arguments.threads, max_batch=arguments.batch) for name, path in engines.items()
    }
    ways = {name: Way() for name in (*engines, "transformers")}
    for number in range(1, arguments.parts + 1):
        settings = DataSettings(
            max_prompts=arguments.count,
            max_new_tokens=arguments.max_new_tokens,
            part=Part(number, arguments.parts),
        )
        for name, generator in generators.items():
            folder = arguments.work / f"{name}-{number}"
            start = time.perf_counter()
            with Progress(disable=True) as progress:
                generate_data(generator, arguments.prompts, folder, settings, progress)
            ways[name].seconds.append(time.perf_counter() - start)
            made = read_data(folder, base, 1)
            ways[name].tokens.append(sum(len(one.answer) for one in made))
            ways[name].answers.update({tuple(one.prompt): one.answer for one in made})
        prompts = sorted((one.prompt for one in made), key=len)
        way = ways["transformers"]
        start = time.perf_counter()
        answers = [
            answer
            for first in range(0, len(prompts), arguments.batch)
            for answer in answer_batch(base.model, prompts[first : first + arguments.batch], arguments.max_new_tokens)
        ]
        way.seconds.append(time.perf_counter() - start)
        way.tokens.append(sum(map(len, answers)))
        way.answers.update({tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)})
    rows = []
    for name, way in ways.items():
        same = sum(way.answers[prompt] == answer for prompt, answer in ways["transformers"].answers.items())
        rows.append(
            {
                "way": name,
                "tokens_per_second": way.rate,
                "seconds": way.seconds,
                "tokens": way.tokens,
                "answers": len(way.answers),
                "same_as_transformers": same,
            }
        )
        print(
            f"{name}: {way.rate:.0f} tokens/s, {way.rate / ways['transformers'].rate:.2f} of transformers'; "
            f"{same} of {len(way.answers)} answers are its"
        )
    if arguments.json:
        conditions = {
            "date": datetime.now(UTC).date().isoformat(),
            "device": cpu_name(arguments.threads),
            "model": base.name,
            "prompts": arguments.count,
            "max_new_tokens": arguments.max_new_tokens,
            "batch": arguments.batch,
            "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")},
        }
        write_json(arguments.json, {"conditions": conditions, "ways": rows})


@torch.inference_mode()
def answer_batch(model: PreTrainedModel, prompts: list[list[int]], most: int) -> list[list[int]]:
    """Return the greedy answers of `transformers`, each up to its end-of-text token and with it."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    pad = min(stops)
    out: torch.Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=pad)
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
        answers.append(row[: end + 1])
    return answers


if __name__ == "__main__":
    main()
