"""Programs with closed and full streams, signals and warnings; each test runs one in a process of its own."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import IO, Any

import pytest

from runtime import program

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = ("runtime.cli", "ht_export.cli", "ht_export.training.cli", "ht_export.bench.cli", "ht_export.parity.cli")

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and file descriptors of POSIX")
linux = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def script(work: str) -> list[str]:
    """Return a command that runs a program with the body of `work`."""
    code = f"""
import os, signal, sys, time, warnings
from pathlib import Path
from runtime.errors import InputError, InputWarning
from runtime.program import run, say
def wait():
    # In short steps: a signal just before a long sleep would be taken after it.
    for _ in range(3000):
        time.sleep(0.01)
def work():
{textwrap.indent(textwrap.dedent(work), "    ")}
sys.exit(run("ht-x", work, interrupted="interrupted; nothing was written"))
"""
    return [sys.executable, "-c", code]


def finished(command: list[str], redirect: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell with `redirect`, such as ">&-"; stdout and stderr are what is left of them."""
    line = f'exec "$@" {redirect}'
    # Buffered streams: what is not written by then comes at the interpreter's end.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["sh", "-c", line, "sh", *command], capture_output=True, text=True, cwd=ROOT, env=environment, **options
    )


def outcome(done: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


@posix
def test_a_closed_stdout_is_one_line() -> None:
    done = finished(script("print('text')"), ">&-")
    assert outcome(done) == (1, "", "ht-x: error: stdout is closed; give it a place to write to\n")


@posix
def test_a_closed_stdout_does_not_matter_where_nothing_is_written_to_it() -> None:
    assert outcome(finished(script("return 3"), ">&- <&-")) == (3, "", "")


@posix
@pytest.mark.parametrize("redirect", ["2>&-", pytest.param("2>/dev/full", marks=linux)])
def test_a_message_that_stderr_does_not_take_is_lost_and_the_work_goes_on(redirect: str) -> None:
    work = """
    print("a message", file=sys.stderr)
    print("a text")
    raise InputError("wrong")
    """
    assert outcome(finished(script(work), redirect)) == (1, "a text\n", "")
    assert outcome(finished(script("print('a message', file=sys.stderr)"), redirect)) == (0, "", "")


@posix
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library writes to its stderr must not go into an engine."""
    work = f"""
    with open({str(tmp_path / "engine")!r}, "wb") as file:
        file.write(b"weights")
        for descriptor in (1, 2):
            try:
                os.write(descriptor, b"a library's message")
            except OSError:
                pass
    """
    assert finished(script(work), "<&- >&- 2>&-").returncode == 0
    assert (tmp_path / "engine").read_bytes() == b"weights"


@linux
@pytest.mark.parametrize("work", ["print('text')", "print('text', flush=True)", "say('text')"])
def test_a_full_stdout_is_one_line(work: str) -> None:
    done = finished(script(work), ">/dev/full")
    assert outcome(done) == (1, "", "ht-x: error: input or output: No space left on device\n")


@linux
def test_a_mistake_is_told_where_stdout_is_full_too() -> None:
    done = finished(script("print('text')\nraise InputError('wrong')"), ">/dev/full")
    assert outcome(done) == (1, "", "ht-x: error: wrong\n")


@posix
@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ("time.sleep(0.3)\nprint('text')", 0),
        ("for _ in range(10**5): print('text', flush=True)\nreturn 3", 0),
        ("time.sleep(0.3)\nsay('text')\nsay('more')\nreturn 3", 3),
    ],
)
def test_a_reader_that_goes_away_is_no_error(work: str, expected: int) -> None:
    process = subprocess.Popen(script(work), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == expected


def test_what_an_error_quotes_does_nothing_to_the_terminal() -> None:
    done = finished(script(r"raise InputError('no engine at a\nb\x1b[2J\udcff\u00e9.onnx')"))
    assert outcome(done) == (1, "", "ht-x: error: no engine at a\\nb\\x1b[2J\\udcff\u00e9.onnx\n")


@posix
def test_a_character_that_stdout_lacks_is_replaced() -> None:
    done = finished(["env", "PYTHONIOENCODING=ascii", *script("print('caf\\u00e9')")])
    assert outcome(done) == (0, "caf?\n", "")


@linux
@pytest.mark.parametrize("module", PROGRAMS)
def test_help_that_cannot_be_written_is_one_line(module: str) -> None:
    done = finished([sys.executable, "-m", module, "--help"], ">/dev/full")
    assert done.returncode == 1
    assert done.stderr.endswith(": error: input or output: No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_program_is_imported_without_anything_that_takes_time(module: str) -> None:
    """Ctrl-C is told in one line only from `run` on."""
    code = f"import sys, {module}; print(sorted({{'numpy', 'torch', 'msgspec', 'rich'}} & sys.modules.keys()))"
    assert finished([sys.executable, "-c", code]).stdout == "[]\n"


def signalled(work: str, *signals: signal.Signals, pause: float = 0.0) -> tuple[int, str]:
    """Run a program, send it `signals` once it says that it is ready; return its status and what it said then."""
    process = subprocess.Popen(script(work), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout and process.stderr
    for number in signals:
        _wait_for_line(process.stdout)
        time.sleep(pause)
        process.send_signal(number)
    return process.wait(timeout=30), process.stderr.read()


def _wait_for_line(stream: IO[str]) -> None:
    assert stream.readline() == "ready\n"


INTERRUPTED = "ht-x: interrupted; nothing was written\n"


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_program_says_so_in_one_line(number: signal.Signals) -> None:
    assert signalled("print('ready', flush=True)\nwait()", number) == (130, INTERRUPTED)


@posix
def test_an_error_that_a_library_makes_of_an_interrupt_is_no_error() -> None:
    """As an import in native code does: a module that cannot be imported is not what is wrong."""
    work = """
    try:
        print("ready", flush=True)
        wait()
    except KeyboardInterrupt:
        raise InputError("ONNX Runtime is not installed") from None
    """
    assert signalled(work, signal.SIGINT) == (130, INTERRUPTED)


CLEANING = """
from runtime.files import atomic_path
with atomic_path(Path({path!r})) as temporary:
    try:
        print("ready", flush=True)
        wait()
    finally:
        print("ready", flush=True)
        {rest}
"""


@posix
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_keep_the_first_from_cleaning_up(
    first: signal.Signals, second: signal.Signals, tmp_path: Path
) -> None:
    work = CLEANING.format(path=str(tmp_path / "engine.onnx"), rest="time.sleep(0.5)")
    assert signalled(work, first, second) == (130, INTERRUPTED)
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_third_signal_ends_a_program_that_does_not_come_to_an_end(tmp_path: Path) -> None:
    rest = "time.sleep(0.2); print('ready', flush=True); wait()"
    work = CLEANING.format(path=str(tmp_path / "engine.onnx"), rest=rest)
    assert signalled(work, signal.SIGINT, signal.SIGINT, signal.SIGINT) == (130, "")


@posix
def test_an_interrupt_that_a_library_swallows_can_be_repeated() -> None:
    work = """
    for _ in range(2):
        try:
            print("ready", flush=True)
            wait()
        except KeyboardInterrupt:
            pass
    print("ready", flush=True)
    wait()
    """
    assert signalled(work, signal.SIGINT, signal.SIGINT, signal.SIGINT) == (130, INTERRUPTED)


@posix
def test_a_signal_at_the_end_of_the_interpreter_shows_no_traceback() -> None:
    work = """
    import atexit
    atexit.register(lambda: (print("ready", flush=True), wait()))
    print("ready", flush=True)
    wait()
    """
    status, said = signalled(work, signal.SIGINT, signal.SIGINT)
    # Shells show 130 for it.
    assert (status, said) == (-signal.SIGINT, INTERRUPTED)


@posix
def test_a_signal_that_was_ignored_stays_so() -> None:
    """As a shell starts what runs in the background, and `nohup`."""
    work = "os.kill(os.getpid(), signal.SIGINT)\nprint('done')"
    assert outcome(finished(["sh", "-c", 'trap "" INT; exec "$@"', "sh", *script(work)])) == (0, "done\n", "")


def test_signals_are_as_before_when_the_work_is_done() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert program.run("ht-x", lambda: None, interrupted="") == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_warning_for_the_user_is_one_line() -> None:
    done = finished(script("warnings.warn(InputWarning('too many threads'))"))
    assert outcome(done) == (0, "", "ht-x: warning: too many threads\n")


def test_other_warnings_are_shown_as_ever() -> None:
    done = finished(script("warnings.warn('odd')"))
    assert "UserWarning: odd" in done.stderr


def test_an_empty_name_of_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from runtime.cli import main

    with pytest.raises(SystemExit):
        main(["", "Hello"])
    assert "argument engine: the name of a file or folder is empty; give one" in capsys.readouterr().err


def test_an_application_without_its_web_framework_says_what_to_install() -> None:
    code = "import sys; sys.modules['starlette'] = None; from runtime.serving import create_app"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert found.stderr.rstrip().splitlines()[-1] == (
        "ModuleNotFoundError: starlette is not installed, and a server needs it; install it with: "
        "pip install 'hidden-transfer[serve]'"
    )
