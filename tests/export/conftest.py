"""What several tests of the export begin with."""

import pytest
import torch

from support import ROOT


@pytest.fixture(scope="session")
def made_up_detector():
    """The demo's detector with random weights that find something everywhere."""
    from lf_dense.frameworks import load_config
    from lf_dense.swap.samples import build_model

    torch.manual_seed(0)
    model = build_model(load_config(str(ROOT / "configs" / "retinanet_lf_demo.py")))
    model.init_weights()
    head = model.bbox_head
    for parameter in (head.retina_cls.weight, head.retina_reg.weight):
        torch.nn.init.normal_(parameter, std=0.05)
    torch.nn.init.constant_(head.retina_cls.bias, -2.0)
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(made_up_detector, tmp_path_factory):
    """Its weights."""
    path = tmp_path_factory.mktemp("checkpoint") / "made_up.pth"
    torch.save({"state_dict": made_up_detector.state_dict(), "meta": {}}, path)
    return path
