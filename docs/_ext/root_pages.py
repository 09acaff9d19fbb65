"""Files of the repository's root that are pages of the site: links to them and in them lead to the pages."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)\)")
TO_ROOT = re.compile(r"\]\(\.\./([A-Z]+\.md)(#[^)\s]*)?\)")


def has_page(page: str) -> bool:
    return (ROOT / "docs" / page).is_file()


def page_link(match: re.Match[str]) -> str:
    """A link of a root file as a link of a page in ``docs/``."""
    target = match[1]
    if target.startswith("docs/"):
        return f"]({target.removeprefix('docs/')})"
    page = target.lower()
    if has_page(page):
        return f"]({page})"
    return f"](../{target})"


def root_link(match: re.Match[str]) -> str:
    """A page's link to a file of the root as a link to the page that includes it, where there is one."""
    page = match[1].lower()
    return f"]({page}{match[2] or ''})" if has_page(page) else match[0]


def link_pages(app: Sphinx, docname: str, content: list[str]) -> None:
    """Rewrite a page's links to files of the root. In the repository they lead to the files themselves."""
    if "/" not in docname:
        content[0] = TO_ROOT.sub(root_link, content[0])


def rewrite_links(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Rewrite the links of an included file of the root, which are relative to the root."""
    if (Path(app.srcdir) / path).resolve().parent == ROOT:
        content[0] = LINK.sub(page_link, content[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Listen to pages and inclusions."""
    app.connect("source-read", link_pages)
    app.connect("include-read", rewrite_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
