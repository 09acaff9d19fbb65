"""LaplacianFormer-Tiny on ImageNet-1K, 300 epochs.

The recipe is PVTv2's and Swin's, with 1,024 images per step.
"""

_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py",
    "mmpretrain::_base_/default_runtime.py",
]
custom_imports = dict(imports=["lf_dense"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="LaplacianFormer", arch="tiny", out_indices=(3,), drop_path_rate=0.1),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=1000,
        in_channels=512,
        init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02),
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
        cal_acc=False,
    ),
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]),
)

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0), paramwise_cfg=dict(bypass_duplicate=True))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best="accuracy/top1"))
