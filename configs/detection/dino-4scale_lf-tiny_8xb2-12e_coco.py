"""DINO with four scales, LaplacianFormer-Tiny, COCO, 12 epochs.

DINO's own recipe: AdamW 1e-4, the backbone at a tenth of it, 16 images per step.
"""

_base_ = ["mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py", "../_base_/slow_backbone.py"]
custom_imports = dict(imports=["lf_dense"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="LaplacianFormer",
        arch="tiny",
        out_indices=(1, 2, 3),
        drop_path_rate=0.1,
        init_cfg=None,
    ),
    neck=dict(in_channels=[128, 320, 512]),
)

optim_wrapper = dict(paramwise_cfg={{_base_.slow_backbone}})

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
