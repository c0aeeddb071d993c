"""OpenVINO GenAI: its pipeline with continuous batching and paged attention, which is its default on x86 CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ht_export.bench.peers.workers.loop import Hear, version_of

NAME = "OpenVINO GenAI"
PACKAGES = ("openvino_genai", "openvino_tokenizers")
# Drafted tokens and the longest n-gram looked up.
LOOKUPS = ((3, 3), (5, 3), (10, 3))
# Tokens of a prompt in a pass, and GB for keys and values, which grow to it.
CACHE_GB = 2
OPTIMUM_BITS = {"8bit": 8, "4bit": 4}


def choices(precision: str, clients: int) -> list[dict[str, Any]]:
    """Return decoding with and without prompt lookup."""
    found: list[dict[str, Any]] = [{}]
    return found + [{"num_assistant_tokens": tokens, "max_ngram_size": size} for tokens, size in LOOKUPS]


def convert(job: dict[str, Any]) -> None:
    """Make OpenVINO's files of a checkpoint by optimum-intel; raises `ImportError` where that is not installed."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    bits = OPTIMUM_BITS.get(job["precision"])
    model = OVModelForCausalLM.from_pretrained(
        job["checkpoint"],
        export=True,
        compile=False,
        local_files_only=True,
        load_in_8bit=False,
        quantization_config=OVWeightQuantizationConfig(bits=bits) if bits else None,
    )
    model.save_pretrained(job["out"])
    _tokenizer(job["checkpoint"], job["out"])


def _tokenizer(checkpoint: str, out: str) -> None:
    """Write the tokenizer in OpenVINO's form, without which the pipeline does not open a folder."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    found = convert_tokenizer(AutoTokenizer.from_pretrained(checkpoint, local_files_only=True), with_detokenizer=True)
    for model, name in zip(found, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(model, str(Path(out) / f"openvino_{name}.xml"))


def open_peer(job: dict[str, Any]) -> OpenVino:
    """Load a folder of OpenVINO's, or a GGUF file."""
    return OpenVino(job)


class OpenVino:
    """A pipeline, loaded."""

    def __init__(self, job: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        self._library, self._array, self._job = openvino_genai, openvino, job
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = job["clients"]
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = False
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": job["threads"]}
        if job["precision"] == "float32":
            # Its defaults are 16 bits where the CPU has them, and 8 bits for keys and values.
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self._lookup = bool(job["setting"])
        if self._lookup:
            properties["prompt_lookup"] = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", properties)
        self.version = version_of("openvino-genai")
        self.about = {name: value for name, value in properties.items() if name != "prompt_lookup"}
        self._asked = 0

    def answer(self, prompts: Sequence[Sequence[int]], hear: Hear) -> None:
        """Answer: a prompt is handed over when one of the clients has its answer."""
        import numpy as np

        waiting = list(enumerate(prompts))
        running: dict[int, Any] = {}
        while waiting or running:
            while waiting and len(running) < self._job["clients"]:
                number, prompt = waiting.pop(0)
                hear(number, ())
                ids = self._array.Tensor(np.asarray([prompt], np.int64))
                running[number] = self._pipeline.add_request(self._asked, ids, self._options())
                self._asked += 1
            self._pipeline.step()
            for number, handle in list(running.items()):
                if handle.can_read():
                    for output in handle.read().values():
                        hear(number, output.generated_ids)
                if handle.get_status() != self._library.GenerationStatus.RUNNING:
                    del running[number]

    def _options(self) -> Any:
        options = self._library.GenerationConfig()
        options.max_new_tokens = self._job["max_new_tokens"]
        options.do_sample = False
        options.repetition_penalty = 1.0
        if self._job["stop_tokens"]:
            options.stop_token_ids = set(self._job["stop_tokens"])
            options.eos_token_id = self._job["stop_tokens"][0]
        for name, value in self._job["setting"].items():
            setattr(options, name, value)
        return options
