"""ONNX Runtime GenAI: its own model builder, n-gram drafts for one prompt, and batches of several."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ht_export.bench.peers.workers.loop import Hear, version_of

NAME = "ONNX Runtime GenAI"
PACKAGES = ("onnxruntime_genai",)
PRECISIONS = {"float32": "fp32", "8bit": "int8", "4bit": "int4"}
# Names are those of `GeneratorParams.set_speculative_options`.
LOOKUPS = (
    {"ngram_size": 3, "max_draft_tokens": 4},
    {"ngram_size": 2, "max_draft_tokens": 8},
    {"ngram_size": 3, "max_draft_tokens": 10},
)


def choices(precision: str, clients: int) -> list[dict[str, Any]]:
    """Return decoding with and without n-gram drafts, which are for one prompt at a time."""
    found: list[dict[str, Any]] = [{}]
    return found if clients > 1 else found + [dict(one) for one in LOOKUPS]


def convert(job: dict[str, Any]) -> None:
    """Make its files of a checkpoint by the model builder. Raises `RuntimeError` with the builder's last line."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", job["checkpoint"], "-o", job["out"]]
    command += ["-p", PRECISIONS[job["precision"]], "-e", "cpu", "-c", job["out"], "--extra_options", "hf_token=false"]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RuntimeError(f"the model builder failed: {lines[-1]}")


def open_peer(job: dict[str, Any]) -> OrtGenAi:
    """Load a folder that the model builder made."""
    return OrtGenAi(job)


class OrtGenAi:
    """A model, loaded."""

    def __init__(self, job: dict[str, Any]) -> None:
        import onnxruntime_genai

        self._library, self._job = onnxruntime_genai, job
        config = onnxruntime_genai.Config(job["model"])
        config.clear_providers()
        # It takes tokens of a prompt for padding where they are the padding's, which the end of a turn often is.
        overlay = {
            "model": {
                "pad_token_id": job["pad_token"],
                "decoder": {"session_options": {"intra_op_num_threads": job["threads"]}},
            }
        }
        if job["stop_tokens"]:
            overlay["model"]["eos_token_id"] = job["stop_tokens"]
        config.overlay(json.dumps(overlay))
        self._model = onnxruntime_genai.Model(config)
        self.version = f"{version_of('onnxruntime-genai')}, {version_of('onnxruntime')}"
        self.about = {"intra_op_num_threads": job["threads"]}

    def answer(self, prompts: Sequence[Sequence[int]], hear: Hear) -> None:
        """Answer in batches of as many prompts as there are clients, padded on the right."""
        import numpy as np

        job = self._job
        for start in range(0, len(prompts), job["clients"]):
            batch = prompts[start : start + job["clients"]]
            for place in range(len(batch)):
                hear(start + place, ())
            longest = max(map(len, batch))
            params = self._library.GeneratorParams(self._model)
            params.set_search_options(
                max_length=longest + job["max_new_tokens"],
                do_sample=False,
                batch_size=len(batch),
                repetition_penalty=1.0,
            )
            if job["setting"]:
                params.set_speculative_options(**job["setting"])
            generator = self._library.Generator(self._model, params)
            # On the right, as its own tokenizer does it: the last token of a prompt is the last that is no padding.
            rows = [list(prompt) + [job["pad_token"]] * (longest - len(prompt)) for prompt in batch]
            generator.append_tokens(np.asarray(rows if len(rows) > 1 else rows[0], np.int32))
            while not generator.is_done():
                generator.generate_next_token()
                for place, token in enumerate(generator.get_next_tokens()):
                    hear(start + place, [int(token)])
