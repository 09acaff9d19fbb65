"""LaplacianFormer-Tiny on ImageNet-1K, distilled by hard labels from DeiT's teacher.

It needs timm, which fetches the teacher's weights.
"""

_base_ = ["./lf-tiny_300e_in1k.py"]
custom_imports = dict(imports=["lf_dense", "lf_dense.distillation"], allow_failed_imports=False)

model = dict(
    type="DistilledClassifier",
    teacher=dict(type="TimmClassifier", model_name="regnety_160.deit_in1k", pretrained=True),
    mode="hard",
    weight=0.5,
)
