"""Lines for a shell name commands, options, extras and files that there are."""

import argparse
import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator

import pytest

from tests.docs.pages import blocks, pages, spans
from tests.modules import ROOT, module_at

COMMANDS = module_at("docs/commands.py")
SHELLS = ("bash", "sh", "")
# Programs of others.
OTHERS = {
    "curl", "docker", "lm_eval", "ln", "mv", "pip", "polygraphy", "pytest", "serve", "source", "tensorboard",
}  # fmt: skip
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.fixture(scope="module")
def programs() -> dict[str, argparse.ArgumentParser]:
    return {parser.prog: parser for parser in COMMANDS.programs()}


@pytest.mark.parametrize("page", pages())
def test_blocks_for_a_shell_are_commands_that_there_are(
    page: str, programs: dict[str, argparse.ArgumentParser], capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(page):
        if block.language not in SHELLS or (not block.language and not block.text.startswith("ht-")):
            continue
        for words in _commands(block.text):
            try:
                _check(words, programs)
            except SystemExit as end:
                assert not end.code, f"{block}: {shlex.join(words)}\n{capsys.readouterr().err}"
            except AssertionError as error:
                raise AssertionError(f"{block}: {shlex.join(words)}: {error}") from error


@pytest.mark.parametrize("page", [page for page in pages() if page != "CHANGELOG.md"])
def test_commands_within_text_have_options_that_there_are(
    page: str, programs: dict[str, argparse.ArgumentParser]
) -> None:
    for span in spans(page):
        words = span.split()
        if not words or words[0] not in programs:
            continue
        parser = programs.get(" ".join(words[:2]), programs[words[0]])
        subcommands = COMMANDS.subcommands(parser)
        if subcommands and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in subcommands, f"{page}: {span}"
            parser = subcommands[words[1]]
        known = {option for action in parser._actions for option in action.option_strings}
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, f"{page}: {span} has {word}; there are {sorted(known)}"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other versions of Python lay out help in other ways")
def test_the_page_of_commands_is_what_they_say() -> None:
    assert COMMANDS.PAGE.read_text(encoding="utf-8") == COMMANDS.page(), "write it again: python docs/commands.py"


def test_every_option_of_every_command_says_what_it_is(programs: dict[str, argparse.ArgumentParser]) -> None:
    for program in programs.values():
        for parser in (program, *COMMANDS.subcommands(program).values()):
            for action in parser._actions:
                if not isinstance(action, argparse._SubParsersAction):
                    assert action.help, f"{parser.prog}: {action.option_strings or action.dest} has no help"


def test_a_mistyped_option_is_found(programs: dict[str, argparse.ArgumentParser]) -> None:
    with pytest.raises(SystemExit) as end:
        _check(["ht-bench", "tune", "engine.onnx", "--thread-count", "2"], programs)
    assert end.value.code == 2
    with pytest.raises(AssertionError, match="no extra nonsense"):
        _check(["pip", "install", ".[cpu,nonsense]"], programs)


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a block."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*_words(line), "&&"]:
            if word not in ("&&", "||", "|", ";", "&"):
                words.append(word)
            elif words:
                # Variables that are set for one command are no part of it.
                while words and re.match(r"[A-Z_]+=", words[0]):
                    del words[0]
                yield words
                words = []


def _words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def _check(words: list[str], programs: dict[str, argparse.ArgumentParser]) -> None:
    """Fail where a command, or an option, a file or an extra of it, is none."""
    program, *rest = words
    # Of whatever environment.
    program = program.rpartition("/bin/")[2]
    if (beside := " ".join([program, *rest[:1]])) in programs:
        program, rest = beside, rest[1:]
    if program in programs:
        programs[program].parse_args(rest)
    elif program == "pip":
        for extra in (name for word in rest if "[" in word for name in word.strip("]").split("[")[1].split(",")):
            assert extra in EXTRAS, f"there is no extra {extra}"
    elif program in ("python", "python3") and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"there is no module {rest[1]}"
    elif program in ("python", "python3"):
        assert (ROOT / rest[0]).is_file(), f"there is no {rest[0]}"
    else:
        assert program in OTHERS or program == "pre-commit", f"{program} is no command of ours"
