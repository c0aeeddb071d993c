import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.chat import ChatTemplate
from runtime.chat.process import TemplateProcess, _places
from runtime.errors import InputError

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def template() -> Iterator[ChatTemplate]:
    yield ChatTemplate("{{ messages[0].content }}", {}, seconds=2.0)


def process_of(template: ChatTemplate) -> int:
    assert template._process is not None
    return template._process._process.pid


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.01)


def test_the_process_ends_with_its_template_and_leaves_no_zombie() -> None:
    template = ChatTemplate("x", {})
    pid = process_of(template)
    assert is_running(pid)
    del template
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_was_killed_is_replaced(template: ChatTemplate) -> None:
    os.kill(process_of(template), signal.SIGKILL)
    wait_for_end(process_of(template))
    assert template.render(HELLO) == "Hello"


def test_a_process_that_dies_at_work_is_the_requests_error_and_is_replaced() -> None:
    slow = ChatTemplate("{% if messages|length > 1 %}{{ (9 * messages|length) ** (9 ** 9) }}{% endif %}fine", {})
    timer = threading.Timer(0.2, os.kill, [process_of(slow), signal.SIGSEGV])
    timer.start()
    with pytest.raises(InputError, match=r"^the chat template cannot render .*: its process ended with signal 11$"):
        slow.render(2 * HELLO)
    timer.join()
    assert slow.render(HELLO) == "fine"


def test_ended_processes_leave_no_open_files(template: ChatTemplate) -> None:
    template.render(HELLO)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        os.kill(process_of(template), signal.SIGKILL)
        wait_for_end(process_of(template))
        template.render(HELLO)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_threads_take_turns(template: ChatTemplate) -> None:
    wrong: list[str] = []

    def ask(number: int) -> None:
        for index in range(20):
            text = f"{number} {index} " * 1000
            if template.render([{"role": "user", "content": text}]) != text:
                wrong.append(text[:10])

    threads = [threading.Thread(target=ask, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_interrupted_request_does_not_answer_the_next(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.chat import process

    template.render(HELLO)

    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(process, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            template.render([{"role": "user", "content": "first"}])
    assert template.render(HELLO) == "Hello"


def test_the_process_has_a_session_of_its_own_few_variables_and_narrow_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "secret")
    template = ChatTemplate("{{ messages[0].content }}", {})
    pid = process_of(template)
    assert os.getsid(pid) == pid
    assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in Path(f"/proc/{pid}/limits").read_text().splitlines()}
    for name in ("Max file size", "Max core file size", "Max open files", "Max processes"):
        assert limits[name] == ["0", "0"], name
    assert 512 << 20 < int(limits["Max address space"][0]) < 1 << 30
    assert limits["Max cpu time"][0] != "unlimited"
    # Standard input, output and error.
    assert len(list(Path(f"/proc/{pid}/fd").iterdir())) == 3


def test_the_process_imports_the_standard_library_and_jinja_alone() -> None:
    code = (
        f"import sys; sys.path += {_places()!r}; import worker; print(*{{name.split('.')[0] for name in sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) == {"__main__", "worker", "jinja2", "markupsafe"}


@pytest.mark.parametrize("executable", ["/bin/false", "/nowhere/python"])
def test_a_program_that_is_no_python(executable: str) -> None:
    before = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(executable)
    try:
        with pytest.raises(InputError, match=f"^cannot start {executable} to render .*multiprocessing.set_executable"):
            TemplateProcess().ask(b"{}", 1.0)
    finally:
        multiprocessing.set_executable(os.fsdecode(before))


# What happens to a program of its own, which prints what it sees.
BEGINNING = """
import os, signal, sys, time
from runtime.chat import ChatTemplate
template = ChatTemplate("{{ messages[0].content }}", {})
hello = [{"role": "user", "content": "Hello"}]
pid = template._process._process.pid
"""
FORKED = """
template._lock.acquire()
child = os.fork()
if child == 0:
    # The lock is as it was in the parent, and the process is the parent's.
    print(template.render(hello), template._process._process.pid != pid, flush=True)
    sys.exit()
template._lock.release()
os.waitpid(child, 0)
print(template.render(hello), template._process._process.pid == pid)
"""
INTERRUPTED = """
signal.signal(signal.SIGINT, lambda *_: None)
os.killpg(os.getpgid(0), signal.SIGINT)
print(template.render(hello), template._process._process.pid == pid)
"""
ENDED = """
print(pid, flush=True)
"""
KILLED = """
print(pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def run(code: str) -> list[str]:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", BEGINNING + code]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert not done.stderr, done.stderr
    return done.stdout.split()


def test_a_forked_process_has_a_process_of_its_own() -> None:
    assert run(FORKED) == ["Hello", "True", "Hello", "True"]


def test_an_interrupt_from_the_terminal_is_not_for_the_process() -> None:
    assert run(INTERRUPTED) == ["Hello", "True"]


@pytest.mark.parametrize("code", [ENDED, KILLED])
def test_the_process_ends_with_the_program(code: str) -> None:
    (pid,) = run(code)
    wait_for_end(int(pid))
