"""Pages that include a file of the repository's root: its links lead to the site's pages, or to the files."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)\)")


def page_link(match: re.Match[str]) -> str:
    """A link of a root file as a link of a page in ``docs/``."""
    target = match[1]
    if target.startswith("docs/"):
        return f"]({target.removeprefix('docs/')})"
    page = target.lower()
    if (ROOT / "docs" / page).is_file():
        return f"]({page})"
    return f"](../{target})"


def rewrite_links(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Rewrite the links of an included file of the root, which are relative to the root."""
    if (Path(app.srcdir) / path).resolve().parent == ROOT:
        content[0] = LINK.sub(page_link, content[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Listen to inclusions."""
    app.connect("include-read", rewrite_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
