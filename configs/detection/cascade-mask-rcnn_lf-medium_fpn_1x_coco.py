"""Cascade Mask R-CNN, LaplacianFormer-Medium, COCO, 1x."""

_base_ = ["./cascade-mask-rcnn_lf-tiny_fpn_1x_coco.py"]

model = dict(backbone=dict(arch="medium", drop_path_rate=0.3))
