"""llama.cpp by `llama-cpp-python`: its `Llama` for one client, and sequences side by side in a context for several."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from ht_export.bench.peers.workers.loop import Hear, version_of

NAME = "llama.cpp"
PACKAGES = ("llama_cpp",)
LOOKUPS = (3, 10)
# Tokens in a pass: the library's own default for servers.
BATCH = 512


def choices(precision: str, clients: int) -> list[dict[str, Any]]:
    """Return decoding with and without flash attention, and with prompt lookup, which is for one prompt at a time."""
    found: list[dict[str, Any]] = [{"flash_attn": False}, {"flash_attn": True}]
    return found if clients > 1 else found + [{"flash_attn": False, "prompt_lookup": count} for count in LOOKUPS]


def open_peer(job: dict[str, Any]) -> Alone | Together:
    """Load a GGUF file."""
    return Alone(job) if job["clients"] == 1 else Together(job)


def _cache_type(job: dict[str, Any]) -> int | None:
    """Return the type of keys and values: in float32 where the arithmetic is to be that, else the library's default."""
    import llama_cpp

    return llama_cpp.GGML_TYPE_F32 if job["precision"] == "float32" else None


def _about(job: dict[str, Any]) -> dict[str, Any]:
    return {"n_threads": job["threads"], "cache": "float32" if job["precision"] == "float32" else "float16"}


class Alone:
    """One prompt at a time."""

    def __init__(self, job: dict[str, Any]) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        lookup = job["setting"].get("prompt_lookup")
        self._job = job
        self._model = Llama(
            job["model"],
            n_ctx=job["context"],
            n_batch=BATCH,
            n_threads=job["threads"],
            n_threads_batch=job["threads"],
            flash_attn=job["setting"]["flash_attn"],
            type_k=_cache_type(job),
            type_v=_cache_type(job),
            draft_model=LlamaPromptLookupDecoding(num_pred_tokens=lookup) if lookup else None,
            verbose=False,
        )
        self.version, self.about = version_of("llama_cpp_python"), _about(job)

    def answer(self, prompts: Sequence[Sequence[int]], hear: Hear) -> None:
        """Answer one after another, with nothing kept of the prompt before."""
        for number, prompt in enumerate(prompts):
            hear(number, ())
            self._model.reset()
            left = self._job["max_new_tokens"]
            for token in self._model.generate(list(prompt), temp=0.0, top_k=1, repeat_penalty=1.0):
                hear(number, [token])
                left -= 1
                if not left or token in self._job["stop_tokens"]:
                    break


class Together:
    """Sequences side by side, as the library's server runs them: a pass has parts of new prompts, and the last token of
    each answer.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp

        self._c, self._job = llama_cpp, job
        llama_cpp.llama_backend_init()
        # One that is collected would be called all the same.
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(job["model"].encode(), options)
        if not self._model:
            raise RuntimeError(f"cannot load {job['model']}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = job["context"] * job["clients"]
        context.n_batch = context.n_ubatch = BATCH
        context.n_seq_max = job["clients"]
        context.n_threads = context.n_threads_batch = job["threads"]
        context.flash_attn_type = int(job["setting"]["flash_attn"])
        if (cache := _cache_type(job)) is not None:
            context.type_k = context.type_v = cache
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError(f"no context of {context.n_ctx} tokens for {job['clients']} sequences")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.version, self.about = version_of("llama_cpp_python"), {**_about(job), "n_seq_max": job["clients"]}

    def answer(self, prompts: Sequence[Sequence[int]], hear: Hear) -> None:
        """Answer: a prompt is handed over when a sequence is free."""
        waiting = list(enumerate(prompts))
        # By sequence: the number of its prompt, the tokens still to be run, how many were, how many may yet come.
        running: dict[int, list[Any]] = {}
        memory = self._c.llama_get_memory(self._context)
        while waiting or running:
            for sequence in range(self._job["clients"]):
                if waiting and sequence not in running:
                    number, prompt = waiting.pop(0)
                    hear(number, ())
                    running[sequence] = [number, list(prompt), 0, self._job["max_new_tokens"]]
            for sequence, token in self._pass(running):
                state = running[sequence]
                hear(state[0], [token])
                state[1], state[3] = [token], state[3] - 1
                if not state[3] or token in self._job["stop_tokens"]:
                    self._c.llama_memory_seq_rm(memory, sequence, -1, -1)
                    del running[sequence]

    def _pass(self, running: dict[int, list[Any]]) -> list[tuple[int, int]]:
        """Run what fits, shortest first, so that none waits for another's prompt; return new tokens by sequence."""
        import numpy as np

        batch, count, ends = self._batch, 0, []
        for sequence, state in sorted(running.items(), key=lambda item: len(item[1][1])):
            part = state[1][: BATCH - count]
            for place, token in enumerate(part):
                batch.token[count] = token
                batch.pos[count] = state[2] + place
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence
                batch.logits[count] = place + 1 == len(state[1])
                count += 1
            state[1], state[2] = state[1][len(part) :], state[2] + len(part)
            if part and not state[1]:
                ends.append((sequence, count - 1))
        batch.n_tokens = count
        if self._c.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        found = []
        for sequence, row in ends:
            logits = np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, row), (self._vocabulary,))
            found.append((sequence, int(logits.argmax())))
        return found
