"""Settings of `ht-bench run`, checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ht_export.prompts import Conversation, evenly, read_conversations
from runtime.bindings import MOST_LAYERS
from runtime.checks import LARGEST, MOST_REPEATS, MOST_THREADS, whole
from runtime.errors import InputError, one_line, shown
from runtime.sampling import Sampling
from runtime.sampling.options import LARGEST_SEED
from runtime.tree import TreeSizes

PLAIN = "plain"
SPECULATIVE = "speculative"
WITHOUT_NGRAMS = "without_ngrams"
TRANSFORMERS = "transformers"
PROMPT_LOOKUP = "prompt_lookup"
EARLY_EXIT = "early_exit"
SELF_SPECULATIVE = "self_speculative"
TEXT_DRAFTS = "text_drafts"
# Those that are computed by transformers.
OF_TRANSFORMERS = (TRANSFORMERS, PROMPT_LOOKUP, EARLY_EXIT)
NAMES = (PLAIN, SPECULATIVE, WITHOUT_NGRAMS, TEXT_DRAFTS, SELF_SPECULATIVE, *OF_TRANSFORMERS)

DEFAULT_SEEDS = 3


@dataclass(frozen=True)
class BenchSettings:
    """`compare` has the name and the file of each other engine; `model` is None to leave transformers out, and
    `adapters` are merged into it.

    `sampling` is without a seed; `seeds` has those that each prompt is run with, (None,) for greedy decoding. `tree`
    None leaves it to the engine. `threads` None takes all physical cores. `device` is as for `Generator`.
    `self_speculative` is the file of the blocks that its draft leaves out, `early_exit` how many layers the drafts of
    transformers pass; None leaves either out.
    """

    engine: Path
    prompts: Path
    model: str | None = None
    compare: tuple[tuple[str, Path], ...] = ()
    count: int | None = None
    tasks: tuple[str, ...] = ()
    max_new_tokens: int = 128
    repeats: int = 3
    warm_up: int = 1
    threads: int | None = None
    device: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seeds: tuple[int | None, ...] = (None,)
    tree: TreeSizes | None = None
    prompt_lookup: bool = False
    without_ngrams: bool = False
    text_drafts: bool = False
    self_speculative: Path | None = None
    early_exit: int | None = None
    adapters: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for name, least, most in (
            ("count", 1, LARGEST),
            ("max_new_tokens", 1, LARGEST),
            ("repeats", 1, MOST_REPEATS),
            ("warm_up", 0, MOST_REPEATS),
            ("threads", 1, MOST_THREADS),
            ("early_exit", 1, MOST_LAYERS),
        ):
            number = getattr(self, name)
            if number is not None:
                whole(f"--{name.replace('_', '-')}", number, least, most)
        for option, asked in (("--prompt-lookup", self.prompt_lookup), ("--early-exit", self.early_exit is not None)):
            if asked and self.model is None:
                raise InputError(f"{option} is that of transformers; leave it or --no-transformers out")
        if self.adapters and self.model is None:
            raise InputError("--adapter is of the model for transformers; leave it or --no-transformers out")
        names = [name for name, _ in self.compare]
        for name in names:
            if not re.fullmatch(r"[\w.-]+", name) or name in NAMES or names.count(name) > 1:
                raise InputError(
                    f"--compare {name}=...: a name must be of letters, digits, '_', '.' and '-', given once, and none "
                    f"of {', '.join(NAMES)}; choose another"
                )


@dataclass(frozen=True)
class Job:
    """One prompt to answer in every way; `sampling` has the seed, if it needs one."""

    id: str
    task: str
    text: str
    sampling: Sampling


def seeds_of(sampling: Sampling, first: int | None, count: int | None) -> tuple[int | None, ...]:
    """Return the seeds that each prompt is run with, `count` from `first` on; raise `InputError` for greedy decoding
    with either, or for a number out of range.
    """
    if not sampling.temperature:
        if first is not None or count is not None:
            raise InputError("--seed and --seeds have no meaning without --temperature above 0; leave them out")
        return (None,)
    first, count = first or 0, DEFAULT_SEEDS if count is None else count
    if count < 1:
        raise InputError(f"--seeds must be at least 1, not {count}")
    if not 0 <= first <= first + count - 1 <= LARGEST_SEED:
        raise InputError(f"--seed {first} and the {count} from it on must be 0 to 2**64 - 1")
    return tuple(range(first, first + count))


def choose_prompts(settings: BenchSettings) -> list[Conversation]:
    """Return the prompts of the tasks asked for, `count` of them, evenly from the whole file; raise `InputError`."""
    found = read_conversations(settings.prompts)
    tasks = sorted({prompt.task for prompt in found})
    for task in settings.tasks:
        if task not in tasks:
            raise InputError(
                f"no prompt of task {shown(task)} in {settings.prompts}; it has: {one_line(', '.join(tasks))}"
            )
    chosen = [prompt for prompt in found if not settings.tasks or prompt.task in settings.tasks]
    return evenly(chosen, settings.count or len(chosen))


def jobs_of(prompts: Sequence[Conversation], settings: BenchSettings) -> list[Job]:
    """Return the work: every prompt, with every seed."""
    return [
        Job(prompt.id, prompt.task, prompt.turns[0], replace(settings.sampling, seed=seed))
        for prompt in prompts
        for seed in settings.seeds
    ]
