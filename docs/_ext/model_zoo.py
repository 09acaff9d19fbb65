"""The table of the model zoo, made from the metafiles that model-index.yml names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
HEADINGS = ("config", "data", "parameters", "FLOPs", "published", "ours", "files")


class Row(NamedTuple):
    """A config of the zoo: each field is the text of a cell, empty where there is nothing to say."""

    config: str
    data: str
    parameters: str
    flops: str
    published: str
    ours: str
    files: str


def metafiles(root: Path = ROOT) -> list[Path]:
    """The metafiles that ``model-index.yml`` names, in its order."""
    index = yaml.safe_load((root / "model-index.yml").read_text())
    return [root / name for name in index["Import"]]


def figures(model: dict[str, Any], source: str) -> str:
    """What a model's results state by one source, the paper (``published``) or us (``ours``)."""
    stated = [
        f"{value} {name}"
        for result in model.get("Results") or []
        if result["Source"] == source
        for name, value in result["Metrics"].items()
        if value is not None
    ]
    return ", ".join(stated)


def files(model: dict[str, Any]) -> str:
    """Links to a model's weights and training log, as Markdown."""
    named = (("weights", model.get("Weights")), ("log", model.get("Training log")))
    return ", ".join(f"[{name}]({address})" for name, address in named if address)


def row(model: dict[str, Any]) -> Row:
    """A model of a metafile as a row of the table."""
    metadata = model["Metadata"]
    flops = metadata.get("FLOPs")
    return Row(
        config=f"[{model['Name']}](../{model['Config']})",
        data=metadata["Training Data"],
        parameters=f"{metadata['Parameters'] / 1e6:.1f} M",
        flops=f"{flops / 1e9:.3g} G" if flops else "",
        published=figures(model, "published"),
        ours=figures(model, "ours"),
        files=files(model),
    )


def rows(root: Path = ROOT) -> Iterator[Row]:
    """One row for each model of each metafile."""
    for path in metafiles(root):
        yield from map(row, yaml.safe_load(path.read_text())["Models"])


def table(zoo: list[Row]) -> list[str]:
    """The zoo as the lines of a Markdown table; a column without any entry is left out."""
    kept = [i for i in range(len(HEADINGS)) if any(entry[i] for entry in zoo)]
    lines = [[HEADINGS[i] for i in kept], ["---"] * len(kept), *([entry[i] for i in kept] for entry in zoo)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


class ModelZoo(SphinxDirective):
    """``{model-zoo}``: the table of all configs."""

    def run(self) -> list[nodes.Node]:
        for path in [ROOT / "model-index.yml", *metafiles()]:
            self.env.note_dependency(str(path))
        content = ["```{rst-class} zoo", "```", "", *table(list(rows()))]
        holder = nodes.Element()
        self.state.nested_parse(StringList(content, source="model-index.yml"), self.content_offset, holder)
        return holder.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("model-zoo", ModelZoo)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
