"""The search for faults in what reads hostile input: generates cases, one after another, for as long as asked.

    python -m tests.hostile.search --kind KIND --seconds SECONDS --seed SEED
    python -m tests.hostile.search --again CASE

KIND is a kind of input, or a group of kinds, which share the time: `generators.py` has them. A case that ends in
anything but success or one `InputError`, that takes more processor time or memory than it may, or whose text is not
that of plain decoding, is a fault. Prints a JSON list with an object for each kind: its name, the number of cases, how
many of them were `accepted` (read without error and used), and `fault`, None or the smallest one that was found. Should
the process itself die, the case that it died of is the newest file in the folder that --cases names; --again reads
such a file.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import pickle
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from runtime.errors import InputError
from tests.hostile.cases import SECRET, SECRET_NAME, Case, FaultError, Kind, valid_files
from tests.hostile.generators import GROUPS, kinds_of

# Seconds of processor time that a case may take, and of any time until the process is ended.
SECONDS, HARD_SECONDS = 5.0, 120.0
# Bytes of address space that a case may take above what the process has when its valid files have been read.
MEMORY = 1 << 30
# Characters of an error; it is one line.
LONGEST_ERROR = 1500
# Seconds for making a fault smaller.
SHRINKING_SECONDS = 20.0
# Of each kind, however long the others and the imports took.
LEAST_CASES = 3
# What libraries say when they are refused memory, which is not always a `MemoryError`.
NO_MEMORY = ("bad_alloc", "bad allocation", "can't allocate memory", "cannot allocate memory", "alloc_cpu")
# Cases of a round: hypothesis keeps what it has drawn in one.
EXAMPLES = 300


@dataclass
class Fault:
    """What was wrong with a case, and where the case is kept."""

    wrong: str
    trace: str
    case: str
    file: str


@dataclass
class Found:
    """The outcome of a search of one kind."""

    kind: str
    cases: int
    accepted: int
    refused: int
    seconds: float
    fault: Fault | None = None


class _OverError(BaseException):
    """The time is over; hypothesis lets it through."""


class Search:
    """A search of one kind, which keeps the case at hand in the file `at_hand`."""

    def __init__(self, name: str, kind: Kind, at_hand: Path) -> None:
        self._name = name
        self._kind = kind
        self._at_hand = at_hand
        self._valid = valid_files(kind.folder)
        self._counts: Counter[str] = Counter()
        self._fault: tuple[Case, FaultError] | None = None

    def run(self, seconds: float, first_seed: int) -> Found:
        """Search until the time is over, or a fault is found and made small."""
        self._begin()
        started = time.monotonic()
        end = started + seconds
        for number in range(first_seed, sys.maxsize):
            if self._fault is not None or (time.monotonic() > end and self._counts.total() >= LEAST_CASES):
                break
            self._round(number, end)
        found = Found(
            self._name,
            sum(self._counts.values()),
            self._counts["accepted"],
            self._counts["refused"],
            round(time.monotonic() - started, 1),
        )
        _limit_memory(None)
        if self._fault is not None:
            case, error = self._fault
            self._keep(case)
            trace = "".join(traceback.format_exception(error)).splitlines()
            found.fault = Fault(str(error), "\n".join(trace[-40:]), _shown(case), str(self._at_hand))
        return found

    def _round(self, number: int, end: float) -> None:
        def one(case: Case) -> None:
            nonlocal end
            if time.monotonic() > end and self._counts.total() >= LEAST_CASES:
                raise _OverError
            try:
                self._counts[self._outcome(case)] += 1
            except FaultError as error:
                if self._fault is None:
                    end = time.monotonic() + SHRINKING_SECONDS
                if self._fault is None or case.size <= self._fault[0].size:
                    self._fault = case, error
                raise

        options = settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        try:
            seed(number)(options(given(self._kind.cases)(one)))()
        except _OverError:
            pass
        except Exception:
            # One that does not come again is a fault, too, whatever hypothesis says of it.
            if self._fault is None:
                raise

    def again(self, case: Case) -> str:
        """Return what becomes of one case. Raises `FaultError`."""
        self._begin()
        return self._outcome(case)

    def _begin(self) -> None:
        """Use what is valid, which must be no error, and then limit memory: libraries have what they need once."""
        try:
            self._kind.use(self._kind.valid)
        except InputError as error:
            raise AssertionError(f"what is valid of {self._name} is refused") from error
        self._put_back(self._kind.valid)
        _limit_memory(MEMORY)

    def _keep(self, case: Case) -> None:
        self._at_hand.write_bytes(pickle.dumps((self._name, case)))

    def _outcome(self, case: Case) -> str:
        """Return "accepted" or "refused". Raises `FaultError`."""
        self._keep(case)
        case.put(self._kind.folder)
        # Ends this process: a library that does not return cannot be stopped otherwise.
        faulthandler.dump_traceback_later(HARD_SECONDS, exit=True)
        started = time.process_time()
        try:
            outcome = self._used(case)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._put_back(case)
        if (taken := time.process_time() - started) > SECONDS:
            raise FaultError(f"it takes {taken:.1f} s")
        return outcome

    def _used(self, case: Case) -> str:
        try:
            self._kind.use(case)
        except InputError as error:
            _check_told(error)
            return "refused"
        except (FaultError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise FaultError(f"{type(error).__name__}: {str(error)[:300]}") from error
        if case.exchanged:
            raise FaultError("a file that was exchanged is read")
        return "accepted"

    def _put_back(self, case: Case) -> None:
        folder = self._kind.folder
        for path in folder.rglob("*"):
            if path.is_file() and str(path.relative_to(folder)) not in self._valid:
                path.unlink()
        for name, content in self._valid.items():
            path = folder / name
            if name in case.files or not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)


def _check_told(error: InputError) -> None:
    """Raise `FaultError` unless what a user is told is one line that can be printed, and not that memory ran out."""
    told = str(error)
    # Nothing that would be a command to a terminal.
    if not told.isprintable() or not 10 < len(told) < LONGEST_ERROR:
        raise FaultError(f"an error of {len(told)} characters, or of more than one line: {told!r:.300}") from error
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        if isinstance(cause, MemoryError) or any(said in text for said in NO_MEMORY):
            raise FaultError(f"it takes more than {MEMORY >> 20} MiB of memory") from error
        cause = cause.__cause__ or cause.__context__


def _shown(case: Case) -> str:
    try:
        return repr(case)[:4000]
    except ValueError:
        return "Python writes no whole number of more than some thousand digits"


def _limit_memory(more: int | None) -> None:
    """Let this process take so many bytes of address space more than it has; None for any number."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (hard if more is None else size + more, hard))


def main() -> None:
    """Search, or use a case again, and print what was found."""
    parser = argparse.ArgumentParser(description="Search for faults in what reads hostile input.")
    parser.add_argument("--kind", action="append", help="a kind of input, or a group of kinds; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, from the start of this program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=Path, help="folder in which the case at hand is kept")
    parser.add_argument("--again", type=Path, metavar="CASE", help="use a case that was kept")
    arguments = parser.parse_args()
    started = time.monotonic()
    os.environ[SECRET_NAME] = SECRET
    os.environ["TQDM_DISABLE"] = "1"
    faulthandler.enable()
    # Results go where nothing else does: libraries print what they like.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Nothing that is there already is read, and nothing is left there.
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        cases = arguments.cases or Path(tempfile.mkdtemp(prefix="hostile-cases-"))
        cases.mkdir(parents=True, exist_ok=True)
        if arguments.again:
            name, case = pickle.loads(arguments.again.read_bytes())
            ((_, kind),) = kinds_of([name], folder)
            print(Search(name, kind, cases / "again.case").again(case), file=out)
            return
        results: list[dict[str, Any]] = []
        kinds = list(kinds_of(arguments.kind or list(GROUPS), folder))
        for number, (name, kind) in enumerate(kinds):
            left = arguments.seconds - (time.monotonic() - started)
            found = Search(name, kind, cases / f"{name}.case").run(left / (len(kinds) - number), arguments.seed)
            results.append(asdict(found))
    print(json.dumps(results), file=out)


if __name__ == "__main__":
    main()
