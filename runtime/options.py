"""Parsers of command lines: what somebody mistyped is answered with the nearest there is, and shells can complete."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from runtime.errors import InputError, nearest
from runtime.program import pathname

SHELLS = ("bash", "zsh", "tcsh")
_CHOICE = re.compile(r"invalid choice: '?([^']*?)'? \(choose from (.*)\)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser whose errors suggest the nearest option or choice, with `--print-completion SHELL`.

    `complete` returns the parser with the options of all subcommands, where this one has them not.
    """

    def __init__(self, *arguments: Any, complete: Callable[[], Parser] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._complete = complete
        # Subcommands have a program's name before their own.
        if " " not in self.prog:
            self.add_argument(
                "--print-completion",
                action=_PrintCompletion,
                choices=SHELLS,
                metavar="SHELL",
                help=f"print what completes this command in {', '.join(SHELLS)}, and do nothing else",
            )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As the library's, but for arguments that are not known, which are an error where they were found: there the
        options are that were meant.
        """
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print `message` in a line, with the nearest to what is not known, and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}{self._suggestion(message)} (options: {self.prog} --help)\n")

    def _suggestion(self, message: str) -> str:
        if "did you mean" in message or "maybe you meant" in message:
            return ""
        if choice := _CHOICE.search(message):
            return nearest(choice[1], re.findall(r"[^\s',]+", choice[2]))
        names = [name for action in self._actions for name in action.option_strings]
        told = message.removeprefix("unrecognized arguments: ").split() if message.startswith("unrecognized") else []
        options = [word.partition("=")[0] for word in told if word.startswith("-")]
        return "".join(filter(None, (nearest(word, names) for word in options[:1])))

    def full(self) -> Parser:
        """Return the parser with the options of all subcommands."""
        return self._complete() if self._complete else self


class _PrintCompletion(argparse.Action):
    """Prints a script of shtab's, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: Any = None) -> None:
        try:
            import shtab
        except ImportError as error:
            raise InputError(
                f"{option} needs shtab; install it with: pip install 'hidden-transfer[completion]'"
            ) from error
        assert isinstance(parser, Parser)
        whole = parser.full()
        for action in _actions(whole):
            if action.type is pathname:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(whole, shell=values))
        parser.exit(0)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from _actions(one)


@contextlib.contextmanager
def optional_imports() -> Iterator[None]:
    """Let what a subcommand imports be missing, where its options are asked for completion alone."""
    with contextlib.suppress(ImportError):
        yield
