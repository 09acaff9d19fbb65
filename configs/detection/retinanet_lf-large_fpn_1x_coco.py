"""RetinaNet, LaplacianFormer-Large, COCO, 1x."""

_base_ = ["../retinanet_lf.py"]

model = dict(backbone=dict(arch="large", drop_path_rate=0.3))
