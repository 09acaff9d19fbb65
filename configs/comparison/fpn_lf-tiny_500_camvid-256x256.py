"""Semantic FPN, LaplacianFormer-Tiny, CamVid, 500 steps of 4 crops of 256 x 256.

Short enough to train several backbones from random weights on a CPU.
"""

_base_ = ["../segmentation/fpn_lf-tiny_4k_camvid-360x360.py"]

steps = 500
crop_size = (256, 256)
model = dict(data_preprocessor=dict(size=crop_size))

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=(480, 360), ratio_range=(0.75, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1)
test_dataloader = dict(num_workers=1)

optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", power=0.9, eta_min=0.0, begin=50, end=steps, by_epoch=False),
]
train_cfg = dict(max_iters=steps, val_interval=250)
default_hooks = dict(checkpoint=dict(interval=250, max_keep_ckpts=1), logger=dict(interval=25))
randomness = dict(seed=0)
