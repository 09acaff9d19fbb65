"""RetinaNet, LaplacianFormer-Tiny, COCO, 1x: the README's config under its full name."""

_base_ = ["../retinanet_lf.py"]
