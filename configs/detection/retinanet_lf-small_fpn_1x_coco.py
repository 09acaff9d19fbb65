"""RetinaNet, LaplacianFormer-Small, COCO, 1x."""

_base_ = ["../retinanet_lf.py"]

model = dict(backbone=dict(arch="small", drop_path_rate=0.1))
