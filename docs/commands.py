"""Write the page of all commands: what each says when it is asked for `--help`.

python docs/commands.py    # writes docs/commands.md; needs the extra [dev]
"""

from __future__ import annotations

import argparse
import importlib
import os
import tomllib
from pathlib import Path

PAGE = Path(__file__).with_name("commands.md")
ROOT = PAGE.parent.parent
COLUMNS = 96
BEGINNING = """# Commands

What each command says with `--help`. All exit with 0, or with 1 and one line that says what to do.
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [BEGINNING]
    for program in programs():
        parts.append(f"\n## {program.prog}\n\n{_help(program)}")
        for name, subcommand in subcommands(program).items():
            parts.append(f"\n### {program.prog} {name}\n\n{_help(subcommand)}")
    return "".join(parts)


def programs() -> list[argparse.ArgumentParser]:
    """Return the parsers of all commands of pyproject.toml, each subcommand with its options."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    found = []
    for target in scripts.values():
        module = importlib.import_module(target.partition(":")[0])
        parser = module.build_parser()
        # Subcommands of `ht-bench` have their options when they are asked for.
        for name in getattr(module, "SUBCOMMANDS", ()):
            subcommands(parser)[name] = subcommands(module.build_parser(name))[name]
        found.append(parser)
        beside = getattr(module, "BESIDE", {}).values()
        found += [importlib.import_module(one).build_parser() for one in beside]
    return found


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the subcommands of a parser by name; none where it has none. Changes to the result hold for the parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found: dict[str, argparse.ArgumentParser] = action._name_parser_map
            return found
    return {}


def _help(parser: argparse.ArgumentParser) -> str:
    os.environ.update(COLUMNS=str(COLUMNS), NO_COLOR="1")
    return f"```text\n{parser.format_help().rstrip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
