"""Cascade Mask R-CNN, LaplacianFormer-Medium, COCO, 3x with shorter sides of 640 to 800."""

_base_ = ["./cascade-mask-rcnn_lf-tiny_fpn_ms-3x_coco.py"]

model = dict(backbone=dict(arch="medium", drop_path_rate=0.3))
