"""The same recipe with PVTv2-B1."""

_base_ = ["./fpn_lf-tiny_500_camvid-256x256.py"]
custom_imports = dict(imports=["lf_dense", "mmdet.models"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdet.PyramidVisionTransformerV2",
        embed_dims=64,
        num_layers=[2, 2, 2, 2],
        drop_path_rate=0.1,
        init_cfg=None,
    )
)
