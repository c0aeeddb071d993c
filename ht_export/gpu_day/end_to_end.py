"""Part 4: how much faster speculative decoding is than plain decoding in the same engine, for several clients."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ht_export.gpu_day.models import dtypes, reference_generator
from ht_export.gpu_day.settings import DaySettings, NotHereError
from ht_export.gpu_day.stages import Sections

CLIENTS = (1, 4, 16)
PROMPTS_OF_A_CLIENT, LEAST_PROMPTS, NEW_TOKENS = 4, 12, 128
# The speed-up that is aimed at, for one client.
GOAL = 2.3
PLANS = ("tensorrt-rtx-plugin", "tensorrt-plugin")


def sections(settings: DaySettings) -> Sections:
    """Yield the tuning of each engine that there is, then each number of clients."""
    for dtype in dtypes(settings):
        yield from _of(settings, f"reference {dtype}", _Engine(settings, dtype))
    for name in PLANS:
        yield from _of(settings, name, _Engine(settings, plan=settings.work / name / "engine.plan"))


def _of(settings: DaySettings, name: str, engine: _Engine) -> Sections:
    yield f"{name}: tuning", engine.tune
    for count in (1, 2) if settings.rehearsal else CLIENTS:
        yield f"{name}: {count} clients", partial(engine.clients, count)
    engine.close()


class _Engine:
    """One engine, opened when it is needed."""

    def __init__(self, settings: DaySettings, dtype: str = "", plan: Path | None = None) -> None:
        self._settings = settings
        self._dtype = dtype
        self._plan = plan
        self._opened: Any = None
        self._warm = False

    def tune(self) -> dict[str, Any]:
        """Time the engine's steps and keep the sizes that pay beside it."""
        from ht_export.bench.tune import measure_menu
        from runtime.bundle.tuning_file import write_tuning

        self._settings.on_gpu_only("tuning, which has the times of a GPU")
        generator = self._open(adapt=False)
        tuning = measure_menu(generator, None, 8, None, quiet=True)
        write_tuning(self._plan or generator.path, tuning)
        self.close()
        menu = tuning.menu
        return {
            "contexts": list(menu.contexts),
            "sizes": [[one.tree_rows, *one.pseudo_rows] for one in menu.sizes],
            "ms": [[1e3 * float(value) for value in row] for row in menu.seconds],
        }

    def clients(self, count: int) -> dict[str, Any]:
        """Answer prompts, plainly and speculatively, for so many clients that each ask again when they are answered."""
        from ht_export.bench.load.arrivals import clients
        from ht_export.bench.load.measure import run

        generator = self._open(adapt=not self._settings.rehearsal)
        jobs = _jobs(self._settings, max(LEAST_PROMPTS, PROMPTS_OF_A_CLIENT * count))
        tokens = 4 if self._settings.rehearsal else NEW_TOKENS
        if not self._warm and not self._settings.rehearsal:
            generator.warm_up()
            self._warm = True
        found: dict[str, Any] = {"clients": count, "prompts": len(jobs), "max_new_tokens": tokens}
        texts = []
        for name, speculate in (("plain", False), ("speculative", True)):
            begun = getattr(generator.engine, "seconds", None)
            done = run(generator, clients(count), jobs, {"max_new_tokens": tokens, "speculate": speculate})
            answers = sorted(done.answers, key=lambda one: one.job)
            texts.append([one.tokens for one in answers])
            found[name] = {
                "seconds": done.seconds,
                "tokens_per_second": sum(len(one.tokens) for one in answers) / done.seconds,
                "tokens_per_step": _per_step(answers),
                "first_token_s": statistics.median(one.first_token_s for one in answers),
                "between_s": statistics.median([gap for one in answers for gap in one.between_s] or [0.0]),
            }
            if begun is not None:
                passes = done.metrics["prompt_passes"] + done.metrics["decode_passes"]
                # What is not the pass: the loop, the scheduler, choices, commits, text.
                spent = done.seconds - (generator.engine.seconds - begun)
                found[name] |= {"passes": passes, "host_us_per_pass": 1e6 * spent / max(1, passes)}
        found["same_text"] = sum(one == other for one, other in zip(*texts, strict=True))
        found["speedup"] = found["speculative"]["tokens_per_second"] / found["plain"]["tokens_per_second"]
        found["goal"] = GOAL if count == 1 else None
        return found

    def close(self) -> None:
        """Free it."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _open(self, *, adapt: bool) -> Any:
        if self._opened is None:
            most = 2 if self._settings.rehearsal else max(CLIENTS)
            if self._plan is None:
                self._opened = reference_generator(self._settings, self._dtype, adapt=adapt, max_batch=most)
            else:
                from runtime import Generator

                self._settings.on_gpu_only("executing a plan")
                if not self._plan.with_suffix(".json").is_file():
                    raise NotHereError(f"no {self._plan.parent.name}: it was not built")
                self._opened = Generator(self._plan, adapt=adapt, max_batch=most, prefix_cache_bytes=0)
        return self._opened


def _per_step(answers: Sequence[Any]) -> float:
    """Return how many tokens of the answers a step made certain, the first of each left out: it is the prompt's."""
    steps = sum(len(one.accepted) for one in answers)
    return sum(len(one.tokens) - 1 for one in answers) / max(1, steps)


def _jobs(settings: DaySettings, count: int) -> list[Any]:
    """Return dev prompts that were carried, evenly, or questions of our own."""
    from ht_export.bench.gpu.engines import example_questions
    from ht_export.bench.settings import Job
    from ht_export.prompts import evenly, read_conversations
    from runtime import Sampling

    count = 2 if settings.rehearsal else count
    carried = settings.kit / "dev-prompts.jsonl"
    if carried.is_file():
        texts = [one.turns[0] for one in evenly(read_conversations(carried), count)]
    else:
        texts = example_questions(count)
    return [Job(str(number), "", text, Sampling()) for number, text in enumerate(texts)]
