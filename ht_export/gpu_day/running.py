"""Running a day's stages: each in a process of its own, within the time there is, whatever fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ht_export.bench.gpu.parts import attempt, isolated
from ht_export.gpu_day.results import DONE, ENOUGH, FAILED, DayResults, state_of
from ht_export.gpu_day.settings import DaySettings, NotHereError, NotOnCpuError
from ht_export.gpu_day.stages import Stage

# Kept of the time for the end: files in pieces, the last words.
RESERVE = 10.0
# After a section its process tells that it begins another, or that there are none left.
BEGINS, COMPLETE, LATE = "begins", "complete", "late"


@dataclass(frozen=True)
class Outcome:
    """What a run did: stages that ended with all they have, and those with something left, with the reason."""

    complete: tuple[str, ...]
    left: dict[str, str]


def run_stages(
    stages: Sequence[Stage],
    settings: DaySettings,
    results: DayResults,
    seconds: float,
    say: Callable[[str], None],
    keep: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run the stages in order for so many seconds; what is found is written at once, and what was found before is not
    looked for again. `keep` is called after each stage.
    """
    end = time.monotonic() + seconds
    complete: list[str] = []
    left: dict[str, str] = {}
    for stage in stages:
        if results.is_done(stage.name):
            say(f"{stage.name}: done before")
            complete.append(stage.name)
            continue
        room = min(float(stage.limit), end - time.monotonic() - RESERVE)
        if room < min(stage.least, stage.limit):
            left[stage.name] = f"{max(0, room):.0f} s were left, and it needs {stage.least}"
            say(f"{stage.name}: not begun: {left[stage.name]}")
            continue
        begun = time.monotonic()
        say(f"{stage.name} (part {stage.part}): {stage.title}; up to {room:.0f} s")
        stopped = _run_stage(stage, settings, results, begun + room, say)
        results.end(stage.name, complete=stopped is None, seconds=time.monotonic() - begun, stopped=stopped)
        keep()
        if results.is_done(stage.name):
            complete.append(stage.name)
        else:
            left[stage.name] = stopped or _unfinished(results.sections(stage.name))
    return Outcome(tuple(complete), left)


def _unfinished(sections: dict[str, Any]) -> str:
    found = {name: state_of(value) for name, value in sections.items()}
    return ", ".join(f"{name} {state}" for name, state in found.items() if state not in ENOUGH)


def _run_stage(
    stage: Stage, settings: DaySettings, results: DayResults, end: float, say: Callable[[str], None]
) -> str | None:
    """Run a stage, in a new process after each section that failed; return what stopped it, None where nothing did.

    What failed in an earlier run comes last: it may fail again, and take long for that.
    """
    failed_before = [name for name, value in results.sections(stage.name).items() if state_of(value) == FAILED]
    done = results.done(stage.name)
    stopped = _run_sections(stage, settings, results, end, say, [*done, *failed_before])
    if stopped is None and failed_before:
        others = [name for name in results.sections(stage.name) if name not in failed_before]
        stopped = _run_sections(stage, settings, results, end, say, others)
    return stopped


def _run_sections(
    stage: Stage,
    settings: DaySettings,
    results: DayResults,
    end: float,
    say: Callable[[str], None],
    skip: Sequence[str],
) -> str | None:
    while (room := end - time.monotonic()) > 0:
        under_way: str | None = None
        failed = False
        for name, value in isolated(work_through, stage, replace(settings, deadline=end), skip, seconds=room):
            if value == BEGINS:
                under_way = name
            elif value == COMPLETE:
                return None
            elif value == LATE:
                return f"the time for {stage.name} was over"
            else:
                # A process that ended, or was ended, says so as an "error" of no section.
                section = under_way if name == "error" else name
                found = {"error": value} if name == "error" else value
                under_way = None
                if section is None:
                    return str(value)
                if name == "error" and time.monotonic() >= end - 1:
                    results.put(stage.name, section, found)
                    return f"{section} was stopped when the time for {stage.name} was over"
                results.put(stage.name, section, found)
                skip = [*skip, section]
                failed = "error" in found
                say(f"  {section}: {_words(found)}")
        if not failed:
            return "its process ended"
    return f"the time for {stage.name} was over"


def _words(found: dict[str, Any]) -> str:
    state = state_of(found)
    words = found.get("error", found.get("skipped", found.get("not_on_a_cpu")))
    return state if state == DONE else f"{state}: {words}"


def work_through(stage: Stage, settings: DaySettings, skip: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield each section of a stage when it begins, and what it found; end after one that failed, as the GPU may be of
    no more use to this process.
    """
    for name, work in stage.sections(settings):
        if name in skip:
            continue
        if not settings.in_time():
            yield "", LATE
            return
        yield name, BEGINS
        begun = time.monotonic()
        found = attempt(_told(work))
        yield name, {**found, "seconds": round(time.monotonic() - begun, 2)}
        if "error" in found:
            return
    yield "", COMPLETE


def _told(work: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    def told() -> dict[str, Any]:
        try:
            return work()
        except NotHereError as error:
            return {"skipped": str(error)}
        except NotOnCpuError as error:
            return {"not_on_a_cpu": str(error)}

    return told
