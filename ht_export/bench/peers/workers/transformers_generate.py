"""`transformers.generate`, in float32 or bfloat16: token by token, or with drafts looked up in the text so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ht_export.bench.peers.workers.loop import Hear, version_of

NAME = "transformers"
PACKAGES = ("torch", "transformers")
LOOKUPS = (3, 5, 10)


def choices(precision: str, clients: int) -> list[dict[str, Any]]:
    """Return the settings to choose from: prompt lookup is for one prompt at a time."""
    found: list[dict[str, Any]] = [{}]
    return found if clients > 1 else found + [{"prompt_lookup_num_tokens": count} for count in LOOKUPS]


def open_peer(job: dict[str, Any]) -> Transformers:
    """Load the checkpoint."""
    return Transformers(job)


class Transformers:
    """A checkpoint, loaded."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(job["threads"])
        dtype = {"float32": torch.float32, "16bit": torch.bfloat16}[job["precision"]]
        self._torch, self._job = torch, job
        self._model = AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=dtype, trust_remote_code=False, local_files_only=True
        ).eval()
        self.version = f"{version_of('transformers')}, {version_of('torch')}"
        self.about = {"dtype": str(dtype).removeprefix("torch."), "attention": self._model.config._attn_implementation}

    def answer(self, prompts: Sequence[Sequence[int]], hear: Hear) -> None:
        """Answer in batches of as many prompts as there are clients, padded on the left."""
        size = self._job["clients"]
        for start in range(0, len(prompts), size):
            numbers = range(start, min(start + size, len(prompts)))
            for number in numbers:
                hear(number, ())
            if len(numbers) == 1:
                self._alone(prompts[start], start, hear)
            else:
                self._together([prompts[number] for number in numbers], start, hear)

    def _alone(self, prompt: Sequence[int], number: int, hear: Hear) -> None:
        ids = self._torch.tensor([prompt])
        self._generate(ids, self._torch.ones_like(ids), streamer=_Streamer(number, hear), **self._job["setting"])

    def _together(self, prompts: Sequence[Sequence[int]], start: int, hear: Hear) -> None:
        torch, longest = self._torch, max(map(len, prompts))
        pad = self._job["pad_token"]
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

        def heard(found: Any, scores: Any, **_: Any) -> Any:
            for place, row in enumerate(found):
                hear(start + place, [int(row[-1])])
            return torch.zeros(len(found), dtype=torch.bool)

        self._generate(ids, mask, stopping_criteria=[heard])

    def _generate(self, ids: Any, mask: Any, **options: Any) -> None:
        job = self._job
        with self._torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=job["max_new_tokens"],
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=job["stop_tokens"] or None,
                pad_token_id=job["pad_token"],
                **options,
            )


class _Streamer:
    """Tells of tokens: the first call of `generate` brings the prompt, each other one what a pass made certain."""

    def __init__(self, number: int, hear: Hear) -> None:
        self._number, self._hear, self._prompt = number, hear, True

    def put(self, tokens: Any) -> None:
        if not self._prompt:
            self._hear(self._number, tokens.flatten().tolist())
        self._prompt = False

    def end(self) -> None:
        pass
