"""Mask2Former, LaplacianFormer-Tiny, ADE20K, 160k steps.

Mask2Former's own recipe: AdamW 1e-4, the backbone at a tenth of it, 16 images per step.
"""

_base_ = ["mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py", "../_base_/slow_backbone.py"]
custom_imports = dict(imports=["lf_dense"], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type="LaplacianFormer", arch="tiny", drop_path_rate=0.1, init_cfg=None),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
)

optim_wrapper = dict(paramwise_cfg={{_base_.slow_backbone}})

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
