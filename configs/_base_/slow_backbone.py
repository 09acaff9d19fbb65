"""The backbone learns at a tenth of the rate; norms and biases have no weight decay.

A custom key outranks the rules for norms and biases. Of several keys that match, the longest counts. So the
keys spell out names of parameters. The rules do not know the bias of torch's attention.
"""

slow_backbone = dict(
    norm_decay_mult=0.0,
    bias_decay_mult=0.0,
    bypass_duplicate=True,
    custom_keys={
        "backbone": dict(lr_mult=0.1),
        "in_proj_bias": dict(decay_mult=0.0),
        **{
            key: dict(lr_mult=0.1, decay_mult=0.0)
            for key in (
                "backbone.stages.0.norm",
                "backbone.stages.1.norm",
                "backbone.stages.2.norm",
                "backbone.stages.3.norm",
                "patch_embed.norm",
                "patch_embed.proj.bias",
                ".norm1.weight",
                ".norm1.bias",
                ".norm2.weight",
                ".norm2.bias",
                ".attn.q.bias",
                ".attn.k.bias",
                ".attn.v.bias",
                ".attn.proj.bias",
                ".attn.dwconv.bias",
                ".ffn.fc1.bias",
                ".ffn.fc2.bias",
                ".ffn.dwconv.bias",
            )
        },
    },
)
