"""Pages of the site that are made from something else: the front page and two more from the repository's own files, and
the options of the commands from their parsers.

mkdocs calls the functions here (`hooks` in mkdocs.yml). Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site, and the files of the repository that they are.
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# Files of the repository that front pages may link to, and that are no part of the site.
NO_PAGES = re.compile(r"\[([^\]]+)\]\((?:LICENSE|[\w/]+\.py)\)")
HELP_COLUMNS = 96
COMMANDS = """# Commands

What each command says with `--help`. All exit with 0, or with 1 and one line that says what to do.
"""
# The front page has no neighbours that a sidebar could list.
ALONE = "---\nhide: [navigation]\n---\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    from mkdocs.structure.files import File

    for name, source in FROM_ROOT.items():
        text = as_page((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=ALONE + text if name == "index.md" else text))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    return files


def as_page(text: str) -> str:
    """Return `text` of a file in the root with its links as they are from within docs/."""
    for name, source in FROM_ROOT.items():
        text = text.replace(f"]({source}", f"]({name}")
    text = NO_PAGES.sub(r"`\1`", text)
    return re.sub(r'(\]\(|src=")docs/', r"\1", text)


def commands_page() -> str:
    """Return the page of all commands: what each says when it is asked for `--help`."""
    parts = [COMMANDS]
    for program in programs():
        parts.append(f"\n## {program.prog}\n\n{_help(program)}")
        for name, subcommand in subcommands(program).items():
            parts.append(f"\n### {program.prog} {name}\n\n{_help(subcommand)}")
    return "".join(parts)


def programs() -> list[argparse.ArgumentParser]:
    """Return the parsers of all commands, each subcommand with its options."""
    from ht_export.bench.cli import SUBCOMMANDS
    from ht_export.bench.cli import build_parser as bench
    from ht_export.cli import build_parser as export
    from ht_export.parity.cli import build_parser as parity
    from ht_export.training.cli import build_parser as train
    from runtime.cli import build_parser as generate
    from runtime.serving.cli import build_parser as serve

    benches = bench()
    choices = subcommands(benches)
    for name in SUBCOMMANDS:
        choices[name] = subcommands(bench(name))[name]
    return [export(), generate(), serve(), train(), benches, parity()]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the subcommands of a parser by name; none where it has none. Changes to the result hold for the parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found: dict[str, argparse.ArgumentParser] = action._name_parser_map
            return found
    return {}


def _help(parser: argparse.ArgumentParser) -> str:
    os.environ.update(COLUMNS=str(HELP_COLUMNS), NO_COLOR="1")
    return f"```text\n{parser.format_help().rstrip()}\n```\n"
