"""LaplacianFormer-Medium on ImageNet-1K, 300 epochs."""

_base_ = ["./lf-tiny_300e_in1k.py"]

model = dict(backbone=dict(arch="medium", drop_path_rate=0.3))
