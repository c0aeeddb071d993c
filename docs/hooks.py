"""Pages of the site that are files of the repository's root, the front page among them.

mkdocs calls `on_files` (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

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
# The front page has no neighbours that a sidebar could list.
ALONE = "---\nhide: [navigation]\n---\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    from mkdocs.structure.files import File

    for name, source in FROM_ROOT.items():
        text = as_page((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=ALONE + text if name == "index.md" else text))
    return files


def as_page(text: str) -> str:
    """Return `text` of a file in the root with its links as they are from within docs/."""
    for name, source in FROM_ROOT.items():
        text = text.replace(f"]({source}", f"]({name}")
    text = NO_PAGES.sub(r"`\1`", text)
    return re.sub(r'(\]\(|src=")docs/', r"\1", text)
