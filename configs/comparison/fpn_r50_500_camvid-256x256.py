"""The same recipe with ResNet-50, as mmsegmentation's Semantic FPN has it."""

_base_ = ["./fpn_lf-tiny_500_camvid-256x256.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="ResNetV1c",
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 1, 1),
        strides=(1, 2, 2, 2),
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
        contract_dilation=True,
        init_cfg=None,
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
