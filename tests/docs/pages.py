"""The documents as tests see them: pages, their headings, links, and blocks of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.modules import ROOT

DOCS = ROOT / "docs"
# A comment in front of a block of Python says why it is not run.
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*")


@dataclass(frozen=True)
class Block:
    """A block of code: its `language` as the page names it, and why it is not run, if it is not."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        """Return where the block is."""
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Return all pages, by their path in the repository."""
    return ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(map(name_of, DOCS.rglob("*.md")))]


def name_of(path: Path) -> str:
    """Return the path of a page in the repository."""
    return path.relative_to(ROOT).as_posix()


def blocks(page: str) -> list[Block]:
    """Return the blocks of code of a page, those that are indented with no language."""
    found, before = [], ""
    for token in _tokens(page):
        if token.type in ("fence", "code_block"):
            reason = NOT_RUN.fullmatch(before)
            language = token.info.split(" ")[0]
            place = token.map[0] + 1 if token.map else 0
            found.append(Block(page, place, language, token.content, reason[1] if reason else None))
        before = token.content if token.type == "html_block" else ""
    return found


def spans(page: str) -> Iterator[str]:
    """Yield the code within text."""
    for token in _tokens(page):
        yield from (child.content for child in token.children or () if child.type == "code_inline")


def links(page: str) -> Iterator[str]:
    """Yield where the links and pictures of a page lead."""
    for token in _tokens(page):
        for child in token.children or ():
            if child.type == "html_inline":
                yield from re.findall(r'(?:src|href)="([^"]+)"', child.content)
            for name in ("href", "src"):
                if child.type in ("link_open", "image") and (place := child.attrs.get(name)):
                    yield str(place)
        if token.type == "html_block":
            yield from re.findall(r'(?:src|href)="([^"]+)"', token.content)


def anchors(page: str) -> tuple[set[str], set[str]]:
    """Return the anchors of a page's headings, as the site makes them and as GitHub does."""
    site, hub = set(), set()
    tokens = _tokens(page)
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            title = "".join(child.content for child in inline.children or ()).strip().lower()
            kept = re.sub(r"[^\w\s-]", "", title)
            site.add(re.sub(r"[\s-]+", "-", kept))
            hub.add(re.sub(r"\s", "-", kept))
    return site, hub


@cache
def _tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))
