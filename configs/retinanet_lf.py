"""RetinaNet, LaplacianFormer-Tiny, COCO, 1x (12 epochs).

AdamW 1e-4, for 16 images per step.
"""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["lf_dense"], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type="LaplacianFormer", arch="tiny", drop_path_rate=0.1, init_cfg=None),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, bypass_duplicate=True),
)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
