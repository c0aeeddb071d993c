"""The process that renders a chat template, which is foreign code: Jinja in a sandbox, behind limits of the system.

`runtime.chat.process` starts it and speaks to it. It imports the standard library and Jinja alone, and so starts soon.
Requests come on standard input and answers go to standard output as frames: the number of bytes that follow, in four
bytes, the highest first, then those. A request is a JSON object; an answer is one byte, `TEXT` or `FAILURE`, and then
UTF-8: a text, or a failure as a JSON object of `line`, `cause`, `refused` and `spent`.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

try:
    import resource
except ImportError:  # No such limits on this system.
    resource = None  # type: ignore[assignment]

TEXT, FAILURE = b"t", b"f"
# Bytes of memory that a template may take beyond what this process has when it starts.
MEMORY = 512 << 20
# Characters of a cause that a failure tells.
LONGEST_CAUSE = 300
# What an environment imports only when it is needed: limits leave no way to open a file.
LAZY_IMPORTS = (
    "encodings.ascii",
    "encodings.latin_1",
    "encodings.unicode_escape",
    "html",
    "jinja2.constants",
    "jinja2.debug",
    "pprint",
    "textwrap",
)


class _ExpiredError(BaseException):
    """The time is over. No `Exception`: nothing between may catch it."""


class _TooLongError(Exception):
    """The text is longer than asked for, by what line `lineno` of the template writes."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.lineno = line


class _Generation(Extension):
    """`{% generation %}` around what the assistant says, as `transformers` has it for training: its body alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the node of a `generation` block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _body(self, context: nodes.EvalContext, caller: Macro) -> str:
        return caller()


class _Dict:
    """The `dict` of templates, without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """The `namespace` of templates: no attribute of it begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Without a name for `self`, which may be the name of an attribute.
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _Namespace._check(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: str) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a name in a namespace may not begin with an underscore, as {name!r} does")


def make_environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that templates are written for: that of `transformers`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not jinja2's own filter: that one escapes HTML characters, which models have not seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def render(template: Template, variables: dict[str, Any], most_characters: int) -> str:
    """Return the template's text. Raises whatever the template does."""
    found, length = [], 0
    # Not `Template.render`: that one compiles a line of code for each frame of an exception, of which there may be
    # a thousand.
    parts: Any = template.root_render_func(template.new_context(variables))
    for part in parts:
        length += len(part)
        if length > most_characters:
            raise _TooLongError(template.get_corresponding_lineno(parts.gi_frame.f_lineno))
        found.append(part)
    return "".join(found)


def line_of(error: BaseException) -> int | None:
    """Return the line of the template that raised `error`, from 1, or None when it came from elsewhere."""
    line = getattr(error, "lineno", None) if isinstance(error, TemplateError | _TooLongError) else None
    trace = error.__traceback__
    while trace is not None:
        template = trace.tb_frame.f_globals.get("__jinja_template__")
        if isinstance(template, Template):
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


class Worker:
    """Answers requests: the first is to compile a template, those after it to render it."""

    def __init__(self) -> None:
        self._environment = make_environment()
        self._template: Template | None = None
        self._variables: dict[str, Any] = {}

    def answer(self, request: dict[str, Any]) -> bytes:
        """Return the answer to one request, whatever the template does."""
        seconds, most = request["seconds"], request["most_characters"]
        failure: dict[str, Any]
        try:
            with _time_limit(seconds):
                return TEXT + self._do(request, most).encode()
        except _ExpiredError as error:
            failure = {"line": line_of(error), "cause": f"it takes more than {seconds:g} s"}
        except MemoryError as error:
            # What is left of the heap may be in pieces: a new process has a whole one.
            cause = f"it needs more than {MEMORY >> 20} MiB of memory"
            failure = {"line": line_of(error), "cause": cause, "spent": True}
        except _TooLongError as error:
            failure = {"line": line_of(error), "cause": f"it writes more than {most:,} characters"}
        except UnicodeEncodeError as error:
            failure = {"line": None, "cause": f"it writes {error.object[error.start]!r}, which is no character"}
        except RecursionError as error:
            failure = {"line": line_of(error), "cause": "it is nested, or calls itself, too deeply"}
        except TemplateError as error:
            failure = {"line": line_of(error), "cause": _text(error), "refused": True}
        except Exception as error:
            failure = {"line": line_of(error), "cause": f"{type(error).__name__}: {_text(error)}"}
        return FAILURE + json.dumps({"refused": False, "spent": False, **failure}).encode()

    def _do(self, request: dict[str, Any], most_characters: int) -> str:
        if self._template is None:
            self._variables = request["variables"]
            self._template = self._environment.from_string(request["source"])
            return ""
        variables = {**self._variables, "messages": request["messages"]}
        if "tools" in request:
            variables["tools"] = request["tools"]
        return render(self._template, variables, most_characters)


def _text(error: BaseException) -> str:
    try:
        # `msg` of a syntax error is without the line, which is that of code made of the template.
        text = str(error.message if isinstance(error, TemplateError) else getattr(error, "msg", error))
    except Exception:
        text = "no text"
    return " ".join(text[:LONGEST_CAUSE].split())


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `_ExpiredError` in the block after so many seconds, or as soon as it is back in Python's hands."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    within = True

    def expire(_signal: int, _frame: FrameType | None) -> None:
        if within:
            raise _ExpiredError

    signal.signal(signal.SIGALRM, expire)
    if resource is not None:
        # Should nobody be there to end this process when Python's hands are bound.
        most = math.ceil(time.process_time() + 2 * seconds + 1)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (_at_most(most, hard), hard))
    # Again and again: an exception that is raised in a destructor is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        yield
    finally:
        within = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_resources() -> None:
    """Take away from this process, for good, what rendering needs none of: files, processes, and more memory."""
    if resource is None:
        return
    limits = {
        resource.RLIMIT_AS: _memory() + MEMORY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        # Those that are open stay so, and no further one opens.
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, limit in limits.items():
        limit = _at_most(limit, resource.getrlimit(kind)[1])
        # Not every system has every one of them.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (limit, limit))


def _at_most(limit: int, hard: int) -> int:
    """Return `limit`, lowered to the one that this process already has."""
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)


def _memory() -> int:
    """Return the bytes of address space that this process has."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _receive(stream: BinaryIO) -> dict[str, Any] | None:
    """Return the next request; None when there will be none: whoever started this process is gone."""
    header = stream.read(4)
    size = int.from_bytes(header, "big")
    content = stream.read(size)
    if len(header) < 4 or len(content) < size:
        return None
    return json.loads(content)


def _send(stream: BinaryIO, answer: bytes) -> None:
    stream.write(len(answer).to_bytes(4, "big"))
    stream.write(answer)
    stream.flush()


def main() -> None:
    """Answer requests until there are no more; the first answer, to none, says that this process is ready."""
    for name in LAZY_IMPORTS:
        __import__(name)
    # The time zone is read from a file.
    datetime.now().strftime("%c")
    worker = Worker()
    _limit_resources()
    _send(sys.stdout.buffer, TEXT)
    while (request := _receive(sys.stdin.buffer)) is not None:
        _send(sys.stdout.buffer, worker.answer(request))
