"""The variants: one model for all, the attention the only difference."""

import torch

from lf_dense import LaplacianAttention
from lf_dense.ablation.variants import BASELINE, FORMS, VARIANTS, build_model


def test_the_attention_is_the_only_difference():
    recipe = FORMS["cpu"]
    models = {}
    for name in VARIANTS:
        torch.manual_seed(0)
        models[name] = build_model(VARIANTS[name], recipe, 10)
    base = models[BASELINE].state_dict()
    extra = {name: set(model.state_dict()) - set(base) for name, model in models.items()}
    with_more = {name for name, keys in extra.items() if keys}
    assert with_more == {"learned_scale", "gaussian_learned_scale", "spatial_reduction"}
    assert all(set(base) <= set(model.state_dict()) for model in models.values())
    for name, model in models.items():
        if name != "spatial_reduction":
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in base.items()), name
        out = model(torch.randn(2, 3, 56, 56))
        assert out.shape == (2, 10)
        out.sum().backward()
        # The bias of keys cannot change a softmax, but everything has to be in the graph.
        assert all(parameter.grad is not None for parameter in model.parameters()), name
    attentions = [module for module in models[BASELINE].modules() if isinstance(module, LaplacianAttention)]
    assert {type(module) for module in attentions} == {LaplacianAttention}
    assert len(attentions) == sum(recipe.depths)
