from dataclasses import replace

import pytest

from ht_export.bench.settings import BenchSettings, choose_prompts, jobs_of, seeds_of
from runtime import InputError, Sampling


def ids(settings: BenchSettings) -> list[str]:
    return [prompt.id for prompt in choose_prompts(settings)]


def test_prompts_are_taken_evenly_from_the_whole_file(settings: BenchSettings) -> None:
    assert ids(settings) == [f"p{i}" for i in range(7)]
    assert ids(replace(settings, count=100)) == [f"p{i}" for i in range(7)]
    assert ids(replace(settings, count=1)) == ["p0"]
    assert ids(replace(settings, count=3)) == ["p0", "p2", "p4"]
    assert ids(replace(settings, count=5)) == ["p0", "p1", "p2", "p4", "p5"]


def test_only_prompts_of_the_tasks_asked_for_are_taken(settings: BenchSettings) -> None:
    assert ids(replace(settings, tasks=("b",))) == ["p1", "p3", "p5"]
    assert ids(replace(settings, tasks=("b", ""), count=2)) == ["p1", "p5"]
    with pytest.raises(InputError, match="no prompt of task 'c'"):
        ids(replace(settings, tasks=("c",)))


def test_jobs_are_first_turns_with_every_seed(settings: BenchSettings) -> None:
    settings = replace(settings, tasks=("",), seeds=(4, 5), sampling=Sampling(temperature=1.0))
    jobs = jobs_of(choose_prompts(settings), settings)
    assert [(job.id, job.text, job.sampling.seed) for job in jobs] == [("p6", "Hello", 4), ("p6", "Hello", 5)]
    assert jobs[0].sampling.temperature == 1.0


def test_greedy_decoding_has_no_seed_and_sampling_three_from_0_on() -> None:
    assert seeds_of(Sampling(), None, None) == (None,)
    assert seeds_of(Sampling(temperature=1.0), None, None) == (0, 1, 2)
    assert seeds_of(Sampling(temperature=1.0), 2**64 - 1, 1) == (2**64 - 1,)
