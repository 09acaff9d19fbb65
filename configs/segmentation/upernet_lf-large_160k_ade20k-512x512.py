"""UPerNet, LaplacianFormer-Large, ADE20K, 160k steps."""

_base_ = ["./upernet_lf-tiny_160k_ade20k-512x512.py"]

model = dict(backbone=dict(arch="large", drop_path_rate=0.3))
