"""RetinaNet, LaplacianFormer-Medium, COCO, 1x."""

_base_ = ["../retinanet_lf.py"]

model = dict(backbone=dict(arch="medium", drop_path_rate=0.3))
