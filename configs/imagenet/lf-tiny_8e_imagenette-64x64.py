"""LaplacianFormer-Tiny on the ten classes of Imagenette at 64 x 64.

A pre-training that two CPU cores finish over a coffee.
"""

_base_ = ["./lf-tiny_300e_in1k.py"]

data_root = "data/imagenette2"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=64, crop_ratio_range=(0.35, 1.0), backend="cv2"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=72, edge="short", backend="cv2"),
    dict(type="CenterCrop", crop_size=64),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    dataset=dict(
        _delete_=True, type="CustomDataset", data_root=data_root, data_prefix="train", pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(
        _delete_=True, type="CustomDataset", data_root=data_root, data_prefix="val", pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

# Mixup and CutMix are for hundreds of epochs.
model = dict(backbone=dict(drop_path_rate=0.0), head=dict(num_classes=10, topk=(1,)), train_cfg=None)
data_preprocessor = dict(num_classes=10)

max_epochs = 8
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        begin=1,
        T_max=max_epochs - 1,
        eta_min=1e-5,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=32)
