"""Links of the documents lead somewhere, and what the documents list is all there is."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.pages import DOCS, anchors, blocks, links, name_of, pages, spans
from tests.modules import ROOT, module_at

HOOKS = module_at("docs/hooks.py")


@pytest.mark.parametrize("page", pages())
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page}: {link} leads nowhere"
        if anchor:
            site, hub = anchors(name_of(target.resolve()))
            assert anchor in site, f"{page}: {link}; the headings there are {sorted(site)}"
            assert anchor in hub, f"{page}: {link} is another anchor on GitHub; change the heading"


@pytest.mark.parametrize("page", [page for page in pages() if page.startswith("docs/")])
def test_pages_of_the_site_link_to_nothing_outside_it(page: str) -> None:
    for link in links(page):
        if not re.match(r"[a-z]+:|#", link):
            target = ((ROOT / page).parent / link.partition("#")[0]).resolve()
            assert target.is_relative_to(DOCS), f"{page}: {link} is not part of the site; name the file instead"


def test_the_navigation_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\s+- .*?([\w/-]+\.md)$", text, re.MULTILINE))
    made = {*HOOKS.FROM_ROOT}
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert listed == there | made


def test_the_front_page_is_short_and_has_one_place_for_the_peers() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 900
    assert text.count("<!-- peers: begin") == text.count("<!-- peers: end -->") == 1


def test_links_of_the_front_page_are_those_of_the_site_when_it_is_a_page_of_it() -> None:
    text = HOOKS.as_page("[a](docs/x.md#y) ![b](docs/images/z.png) [c](CONTRIBUTING.md) [d](LICENSE)")
    assert text == "[a](x.md#y) ![b](images/z.png) [c](contributing.md) `d`"


def test_every_file_of_measurements_is_in_their_index() -> None:
    index = "docs/measurements/README.md"
    linked = {Path(link).name for link in links(index) if link.endswith(".json")}
    assert linked == {path.name for path in (DOCS / "measurements").glob("*.json")}


def test_the_errors_that_are_explained_are_those_of_the_code() -> None:
    code = "".join(
        path.read_text(encoding="utf-8")
        for package in ("runtime", "ht_export")
        for path in (ROOT / package).rglob("*.py")
    )
    # Literals that go on in the next line are one.
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    explained = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    assert len(explained) > 50
    for line in explained:
        for message in re.findall(r"`([^`]+)`", line):
            for part in re.split(r"\.\.\.|\bN\b", message):
                assert part.strip() in code, f"no error says {part.strip()!r} ({message})"


def test_files_of_the_repository_that_the_documents_name_are_there() -> None:
    places = re.compile(r"(?:docs|scripts|tests|examples|runtime|ht_export|plugins|docker)/[\w/.-]+\.\w+")
    for page in pages():
        if page == "CHANGELOG.md":
            continue
        for span in spans(page):
            for name in places.findall(span):
                if not (ROOT / name).exists() and "results.json" not in name:
                    # The index of raw files tells what scripts were called once.
                    assert page == "docs/measurements/README.md", f"{page}: there is no {name}"
    assert blocks("README.md")
