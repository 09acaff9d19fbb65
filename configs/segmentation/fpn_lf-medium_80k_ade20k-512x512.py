"""Semantic FPN, LaplacianFormer-Medium, ADE20K, 80k steps."""

_base_ = ["./fpn_lf-tiny_80k_ade20k-512x512.py"]

model = dict(backbone=dict(arch="medium", drop_path_rate=0.3))
