"""Predictions for image files: detection, segmentation and classification alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from mmengine.structures import BaseDataElement

from ..errors import UsageError
from ..files import find_images, picture_names, write_atomically
from ..frameworks import datasets_of, framework_of, type_name
from ..swap.settings import nested
from ..weights.reading import guard_mmengine, read_checkpoint
from ..weights.resuming import load_weights
from .boxes import clip_boxes, drawable
from .quietness import end_bar, progress_bar


def _image_pipeline(config: Config) -> Compose:
    """The test pipeline without annotations, reading files."""
    (_, dataset), *_ = datasets_of(config, ("test",))
    steps = [step for step in dataset["pipeline"] if "Annotations" not in type_name(step)]
    if "LoadImageFromFile" not in type_name(steps[0]):
        steps[0] = {"type": "LoadImageFromFile"}
    return Compose(steps)


def build_model(config: Config, checkpoint: str | None) -> tuple[Any, dict[str, Any]]:
    """A config's model on the CPU with a checkpoint's weights, and the checkpoint.

    Without one the model has its initial weights, and the checkpoint is empty.

    Raises:
        UsageError: framework or checkpoint cannot work, or the checkpoint does not cover the model.
    """
    scope = framework_of(config).scope
    guard_mmengine()
    loaded = read_checkpoint(checkpoint) if checkpoint else {}
    init_default_scope(scope)
    settings = config.model.copy()
    if config.get("data_preprocessor") and "data_preprocessor" not in settings:
        settings["data_preprocessor"] = config.data_preprocessor
    # A checkpoint made without a GPU runs where there is none.
    model = revert_sync_batchnorm(MODELS.build(settings))
    if checkpoint:
        load_weights(model, checkpoint, loaded.get("state_dict", loaded))
    else:
        # mmengine would print how every parameter was made, which belongs in a training's log file.
        model._dump_init_info = lambda *_: None
        model.init_weights()
        del model._dump_init_info
    return model, loaded


def dataset_meta(config: Config, checkpoint: dict[str, Any], path: str) -> dict[str, Any]:
    """Class names and colours, from the checkpoint, else the config, else its test set's class.

    Raises:
        UsageError: none of them names the classes.
    """
    meta = {
        key.lower(): value for key, value in (checkpoint.get("meta", {}).get("dataset_meta") or {}).items()
    }
    if not meta.get("classes"):
        (_, dataset), *_ = datasets_of(config, ("test",))
        meta = dict(dataset.get("metainfo") or {})
    if not meta.get("classes"):
        with DATASETS.switch_scope_and_registry(framework_of(config).scope) as registry:
            known = dict(getattr(registry.get(type_name(dataset)), "METAINFO", None) or {})
        # A data set's own classes are the model's where it has as many.
        counts = {part.get("num_classes") for part in nested(config.model)}
        meta = known if len(known.get("classes") or ()) in counts else {}
    if not meta.get("classes"):
        raise UsageError(
            f"neither {path} nor the config nor its data set names the classes: set "
            "test_dataloader.dataset.metainfo.classes."
        )
    return meta


class Predictor:
    """A model with its weights and test pipeline, ready for image files.

    Args:
        config: config of any of the three frameworks.
        checkpoint: path or address; has to cover the whole model.
        device: torch device.

    Raises:
        UsageError: framework or checkpoint cannot work.
    """

    def __init__(self, config: Config, checkpoint: str, device: str) -> None:
        self.scope = framework_of(config).scope
        self.model, loaded = build_model(config, checkpoint)
        self.model.to(device).eval()
        self.meta = dataset_meta(config, loaded, checkpoint)
        self.pipeline = _image_pipeline(config)
        visualizer = {
            **config.get("visualizer", {"type": "Visualizer"}),
            "name": "lf_dense_predict",
            "vis_backends": None,
        }
        self.visualizer = VISUALIZERS.build(visualizer)
        self.visualizer.dataset_meta = {"palette": None, **self.meta}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def _loaded(self, pixels: np.ndarray) -> dict[str, Any]:
        """What the pipeline's first step, which reads files, would make of ``(H, W, 3)`` uint8 BGR pixels."""
        loader = self.pipeline.transforms[0]
        if getattr(loader, "color_type", "color") == "grayscale":
            pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
        if getattr(loader, "to_float32", False):
            pixels = pixels.astype(np.float32)
        shape = pixels.shape[:2]
        return {"img": pixels, "img_path": "", "img_id": 0, "img_shape": shape, "ori_shape": shape}

    @torch.no_grad()
    def predict(self, image: Path | np.ndarray) -> BaseDataElement:
        """The framework's own data sample for one image, at the image's own size.

        Args:
            image: a file, or ``(H, W, 3)`` uint8 BGR pixels.
        """
        if isinstance(image, np.ndarray):
            data = self._loaded(image)
            for step in self.pipeline.transforms[1:]:
                data = step(data)
        else:
            data = self.pipeline({"img_path": str(image), "img_id": 0})
        sample = self.model.test_step(pseudo_collate([data]))[0].cpu()
        if self.scope == "mmdet":
            clip_boxes(sample)
        return sample

    def picture(self, name: str, pixels: np.ndarray, sample: BaseDataElement, score_thr: float) -> np.ndarray:
        """A prediction over its image, both ``(H, W, 3)`` uint8 RGB; detections above the threshold alone."""
        drawn: list[np.ndarray] = []
        # Without a file to write, a visualizer hands its picture to the backends that store it.
        self.visualizer.add_image = lambda name, image, step=0: drawn.append(image)
        if self.scope == "mmpretrain":
            self.visualizer.visualize_cls(pixels, sample, classes=list(self.meta["classes"]), draw_gt=False)
        elif self.scope == "mmdet":
            shown = drawable(sample, getattr(self.visualizer, "line_width", 0))
            self.visualizer.add_datasample(name, pixels, shown, draw_gt=False, pred_score_thr=score_thr)
        else:
            self.visualizer.add_datasample(name, pixels, sample, draw_gt=False)
        return drawn[0]

    def draw(
        self, name: str, pixels: np.ndarray, sample: BaseDataElement, out: Path, score_thr: float
    ) -> None:
        """Draw a prediction over its image ``(H, W, 3)`` uint8 RGB and write the picture."""
        import mmcv

        mmcv.imwrite(mmcv.rgb2bgr(self.picture(name, pixels, sample, score_thr)), str(out))

    def record(self, sample: BaseDataElement, score_thr: float) -> dict[str, Any]:
        """A prediction as plain JSON values.

        - Detection: ``predictions`` of ``bbox`` (x1, y1, x2, y2 in pixels, to the hundredth), ``score``,
          ``class``, and ``mask`` (COCO run lengths) where the model makes masks.
        - Segmentation: ``classes``, each class's share of the pixels.
        - Classification: ``predictions``, the five best classes with their scores.
        """
        classes = self.meta["classes"]
        if self.scope == "mmdet":
            return {"predictions": list(self._instances(sample.pred_instances, classes, score_thr))}
        if self.scope == "mmseg":
            labels = sample.pred_sem_seg.data.numpy().ravel()
            return {"classes": class_shares(np.bincount(labels.astype(np.int64)), classes)}
        scores, labels = sample.pred_score.topk(min(5, len(classes)))
        return {
            "predictions": [
                {"class": classes[c], "score": s} for c, s in zip(labels.tolist(), scores.tolist())
            ]
        }

    @staticmethod
    def _instances(
        instances: BaseDataElement, classes: list[str], score_thr: float
    ) -> Iterator[dict[str, Any]]:
        kept = instances[instances.scores >= score_thr]
        for index in range(len(kept)):
            mask = None
            if "masks" in kept:
                from pycocotools import mask as coco_mask

                encoded = coco_mask.encode(np.asfortranarray(kept.masks[index].numpy().astype(np.uint8)))
                mask = {"size": encoded["size"], "counts": encoded["counts"].decode()}
            name = classes[int(kept.labels[index])]
            yield detection_record(name, float(kept.scores[index]), kept.bboxes[index].tolist(), mask)


def label_dtype(num_classes: int) -> type[np.uint8] | type[np.uint16]:
    """The pixels of a label map with so many classes."""
    return np.uint8 if num_classes <= 256 else np.uint16


def save_png(path: Path, pixels: np.ndarray) -> None:
    """Write a label map ``(H, W)`` or an RGB picture as a PNG, without a copy of the pixels in memory."""
    from PIL import Image

    write_atomically(path, lambda stream: Image.fromarray(pixels).save(stream, "png"))


def class_shares(counts: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Each class's share of the pixels, from each label's count; without a name it has its number."""
    return {
        classes[label] if label < len(classes) else f"class {label}": counts[label] / counts.sum()
        for label in np.flatnonzero(counts).tolist()
    }


def detection_record(name: str, score: float, box: list[float], mask: dict | None) -> dict[str, Any]:
    """One detection as ``predictions.json`` has it."""
    # Scaling back to the image leaves errors of float32 in a coordinate: 426.00003 at the border of 426.
    found = {"class": name, "score": score, "bbox": [round(x, 2) for x in box]}
    return found if mask is None else {**found, "mask": mask}


def named_images(source: str | Path, out: Path) -> dict[Path, Path]:
    """The images of a source by their path relative to it; results of an earlier call below it are none.

    Raises:
        UsageError: the source is not there, or holds no image.
    """
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    images = [image for image in find_images(source) if out.resolve() not in image.resolve().parents]
    if not images:
        raise UsageError(f"every image of {source} lies in {out}, where results go: give another --out.")
    return {image.relative_to(root): image for image in images}


def read_image(path: Path) -> np.ndarray | None:
    """An image file as ``(H, W, 3)`` uint8 BGR, turned as its EXIF data say; None where it is no image.

    Raises:
        UsageError: it has more pixels than OpenCV reads.
    """
    import mmcv

    try:
        return mmcv.imread(str(path))
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" not in str(error):
            return None
        raise UsageError(
            f"{path} has more pixels than OpenCV reads by itself (2**30): set OPENCV_IO_MAX_IMAGE_PIXELS to "
            "more, and OPENCV_IO_MAX_IMAGE_WIDTH and OPENCV_IO_MAX_IMAGE_HEIGHT where a side is over 2**20."
        ) from error


def refuse_unreadable(unreadable: list[str], total: int) -> None:
    """Name files that are no images, when the others are done.

    Raises:
        UsageError: there are some.
    """
    if unreadable:
        raise UsageError(
            f"{len(unreadable)} of {total} files could not be read as images: {', '.join(unreadable[:5])}."
        )


def predict_images(
    predictor: Predictor,
    source: str | Path,
    out: str | Path,
    score_thr: float = 0.3,
    also: Callable[[Path, Path], object] | None = None,
) -> Path:
    """Predict an image or a folder.

    Pictures go to ``out/pictures``, label maps to ``out/labels``, results to ``out/predictions.json``.

    Args:
        predictor: the model.
        source: image file or folder (searched below, order by name).
        out: folder for the results.
        score_thr: detections below it are neither drawn nor listed.
        also: what else to do for each image that can be read; gets its path, and that relative to the source.

    Returns:
        The JSON file: ``{"classes": [...], "images": {path relative to source: {"height", "width", ...}}}``.

    Raises:
        UsageError: no image, some could not be read, or ``also`` raised this; the readable ones have been
            predicted and written by then.
    """
    import mmcv

    out, classes = Path(out), predictor.meta["classes"]
    images = named_images(source, out)
    pictures = picture_names(images)
    records: dict[str, Any] = {}
    unreadable: list[str] = []
    refused: list[UsageError] = []
    bar = progress_bar(len(images)) if len(images) > 1 else None
    for name, image in images.items():
        pixels = read_image(image)
        if pixels is None:
            unreadable.append(str(image))
        else:
            sample = predictor.predict(image)
            predictor.draw(
                image.name, mmcv.bgr2rgb(pixels), sample, out / "pictures" / pictures[name], score_thr
            )
            height, width = sample.ori_shape
            records[name.as_posix()] = {
                "height": height,
                "width": width,
                **predictor.record(sample, score_thr),
            }
            if "pred_sem_seg" in sample:
                labels = sample.pred_sem_seg.data.numpy()[0]
                save_png(out / "labels" / pictures[name], labels.astype(label_dtype(len(classes))))
            if also:
                try:
                    also(image, name)
                except UsageError as error:
                    refused.append(error)
        if bar:
            bar.update()
    end_bar(bar)
    result = out / "predictions.json"
    write_atomically(result, json.dumps({"classes": list(classes), "images": records}, indent=1).encode())
    refuse_unreadable(unreadable, len(images))
    if refused:
        raise refused[0]
    return result
