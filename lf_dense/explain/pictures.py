"""Picture files: of what queries in an image attend to, of receptive fields, and of feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..training.curves import save_figure
from ..training.prediction import Predictor
from .capture import capture, choose_block, choose_stages
from .features import feature_maps
from .figures import draw_attention, draw_features, draw_heads, draw_receptive_fields
from .placing import PlacedImage, Subject, place_image, place_query
from .receptive import receptive_fields, side_that_holds, square_inputs
from .rows import AttentionRow, check_query, row_at, token_at

Query = tuple[float, float]


def query_rows(
    subject: Subject,
    image: PlacedImage,
    queries: Sequence[Query],
    stages: Sequence[int] | None = None,
    block: int | None = None,
) -> list[list[AttentionRow]]:
    """What each query, a pixel ``(x, y)`` of the image, attends to: for each one a row per stage.

    Raises:
        UsageError: a query lies outside the image or is cropped away, or a stage or block does not exist.
    """
    height, width = image.pixels.shape[:2]
    for query in queries:
        check_query(query, width, height)
    points = [place_query(image, query) for query in queries]
    layers = capture(subject.backbone, image.inputs, stages, block)
    return [[row_at(inputs, token_at(inputs, *point)) for inputs in layers] for point in points]


def write_attention(
    subject: Subject,
    path: Path,
    queries: Sequence[Query],
    out: Path,
    stages: Sequence[int] | None = None,
    block: int | None = None,
    heads: int | None = None,
) -> list[tuple[Path, list[AttentionRow]]]:
    """Draw what queries in an image file attend to: ``out/IMAGE_attention_X_Y.png`` for each.

    Args:
        subject: the backbone, and how images become its input.
        path: image file.
        queries: pixels ``(x, y)`` of it.
        out: folder for the pictures.
        stages: stages to show, 1 to 4; None shows all.
        block: block of each stage, from 1 on; None is the last.
        heads: stage whose heads are drawn one by one, into ``out/IMAGE_heads_X_Y.png``; None draws none.

    Returns:
        Each picture, with the rows that it shows.

    Raises:
        UsageError: image, query, stage or block cannot be shown.
    """
    chosen = choose_stages(subject.backbone, stages)
    wanted = sorted({*chosen, *choose_stages(subject.backbone, [heads] if heads is not None else chosen)})
    for stage in wanted:
        choose_block(subject.backbone, stage, block)
    image = place_image(subject, path)
    pictures = []
    for query, rows in zip(queries, query_rows(subject, image, queries, wanted, block)):
        # The suffix stays in the name: a.jpg and a.png are two images.
        place = f"{query[0]:g}_{query[1]:g}"
        shown = [row for row in rows if row.stage in chosen]
        figure = draw_attention(shown, image.pixels, query, image.placement, path.name)
        pictures.append((save_figure(figure, out / f"{path.name}_attention_{place}.png"), shown))
        for row in rows:
            if row.stage == heads:
                figure = draw_heads(row, image.pixels, query, image.placement, path.name)
                pictures.append((save_figure(figure, out / f"{path.name}_heads_{place}.png"), [row]))
    return pictures


def explain_image(predictor: Predictor, image: Path, queries: Sequence[Query], out: Path) -> list[Path]:
    """Draw what pixels of an image attend to, in the last block of each stage.

    Args:
        predictor: a model with a LaplacianFormer, and its test pipeline.
        image: image file.
        queries: pixels ``(x, y)`` of it, from its upper left corner.
        out: folder for the pictures.

    Returns:
        One picture for each query, ``out/IMAGE_attention_X_Y.png``.

    Raises:
        UsageError: the model has no LaplacianFormer, the file is no image, or a query lies outside it.
    """
    return [path for path, _ in write_attention(Subject.of(predictor), Path(image), queries, Path(out))]


def write_features(subject: Subject, path: Path, out: Path) -> Path:
    """Draw the feature maps of an image file: ``out/IMAGE_features.png``.

    Raises:
        UsageError: the file is no image, or the pipeline cannot take it.
    """
    image = place_image(subject, path)
    maps = feature_maps(subject.backbone, image.inputs)
    figure = draw_features(maps, image.pixels, image.placement, f"Feature maps of {path.name}")
    return save_figure(figure, out / f"{path.name}_features.png")


def write_receptive_fields(
    subject: Subject, folder: str | Path, out: Path, size: int = 224, limit: int = 16
) -> tuple[Path, dict[int, int]]:
    """Measure and draw the receptive fields over images: ``out/receptive_field.png``.

    Args:
        subject: the backbone, and how images become its input.
        folder: an image, or a folder that is searched for images.
        out: folder for the picture.
        size: side in pixels of the square that every image is resized to.
        limit: the most images to take.

    Returns:
        The picture, and for each stage the side in pixels of the square that holds half of its field.

    Raises:
        UsageError: there is no image, one cannot be read, or the size is too small.
    """
    images = square_inputs(subject, folder, size, limit)
    fields = receptive_fields(subject.backbone, images)
    stages = [index + 1 for index in subject.backbone.out_indices]
    title = f"Effective receptive fields over {len(images)} images of {size} x {size}"
    path = save_figure(draw_receptive_fields(fields, stages, title), out / "receptive_field.png")
    return path, {stage: side_that_holds(field) for stage, field in zip(stages, fields)}
