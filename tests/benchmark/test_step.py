"""The command ``step``: the options that it refuses, and two backends that train in turn."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from lf_dense import backends
from lf_dense.benchmark import step


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--repeat", "0"], "error: --batch-size, --repeat and --shape have to be at least 1."),
        (["--batch-size", "0"], "error: --batch-size, --repeat and --shape have to be at least 1."),
        (["--shape", "64", "0"], "error: --batch-size, --repeat and --shape have to be at least 1."),
        (["--repeat", "often"], "argument --repeat: invalid int value: 'often'"),
        (["--device", "nowhere"], "--device nowhere is no device: use cpu, cuda or cuda:N."),
        (["no/such/config.py"], "no/such/config.py"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(exit_code, capsys, argv, sentence):
    assert exit_code("step", *argv) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err.splitlines()[-1]
    assert captured.out == ""


def test_config_options_are_read_as_everywhere(benchmark_tool):
    argv = ["step", "--cfg-options", "optim_wrapper.optimizer.lr=0.5", "model.names=[a,b]", "x=true"]
    assert benchmark_tool.parse_args(argv).cfg_options == {
        "optim_wrapper.optimizer.lr": 0.5,
        "model.names": ["a", "b"],
        "x": True,
    }
    assert benchmark_tool.parse_args(["step"]).cfg_options is None


def test_backends_train_copies_in_turn_by_the_same_random_numbers():
    order = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def train_step(self, data, optimizer):
            order.append(backends.requested_backend())
            noise = torch.rand(())
            loss = ((self.weight - data["target"]) ** 2).sum() * noise
            optimizer.update_params(loss)
            # A step may change its batch, and the next one must not see it.
            data["target"] = 0
            return {"loss": loss.detach()}

    optimizer = {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.1}}
    model = Model()
    steps = step.train_in_turn(model, optimizer, {"target": 1.0}, repeats=2, device=torch.device("cpu"))
    assert order == ["native", "reference"] * 3
    assert steps["native"].losses == steps["reference"].losses
    assert steps["native"].losses[-1]["loss"] > 0
    assert [len(steps[name].seconds) for name in step.BACKENDS] == [2, 2]
    assert [len(steps[name].losses) for name in step.BACKENDS] == [3, 3]
