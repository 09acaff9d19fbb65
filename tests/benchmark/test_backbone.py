"""The command ``backbone``: its tables, and the options that it refuses."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from lf_dense.benchmark import backbone

CPU_ONCE = ("backbone", "--device", "cpu", "--repeat", "1", "--shape")


def test_tables_of_the_backbone_and_its_operators(exit_code, capsys):
    assert exit_code(*CPU_ONCE, "64", "96") == 0
    times, operators = capsys.readouterr().out.split("\n\n")
    heading, *table = times.splitlines()
    assert heading.startswith(f"torch {torch.__version__}, cpu, ")
    assert heading.endswith(", 1 x 3 x 64 x 96")
    assert table[:2] == ["| backbone | median s | min s | max s |", "|---|---|---|---|"]
    assert table[2].startswith("| LaplacianFormer-tiny | ")
    assert len(table) == 3
    shares = [float(line.split("|")[-2].strip().rstrip("%")) for line in operators.splitlines()[2:]]
    assert len(shares) == backbone.NUM_OPERATORS_SHOWN
    assert sorted(shares, reverse=True) == shares
    assert 0 < sum(shares) <= 101


def test_models_run_in_turn_after_a_pass_that_does_not_count():
    order = []

    class Model(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, image):
            assert not torch.is_grad_enabled()
            order.append(self.name)

    models = {name: Model(name) for name in "ab"}
    times = backbone.time_models(models, torch.zeros(1), repeats=2)
    assert order == ["a", "b"] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_other_backbones_need_mmdet(exit_code, monkeypatch, capsys):
    monkeypatch.setattr(backbone, "find_spec", lambda name: None)
    assert exit_code(*CPU_ONCE, "64", "96", "--peers") == 2
    assert capsys.readouterr().err.startswith("error: --peers cannot be used: it needs mmdet, ")


def test_other_backbones_are_three():
    pytest.importorskip("mmdet")
    assert list(backbone.build_other_backbones()) == ["PVTv2-B1", "Swin-T", "ResNet-50"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--arch", "titanic"], "invalid choice: 'titanic'"),
        (["--repeat", "0"], "'0' is not a whole number, at least 1"),
        (["--shape", "64", "-1"], "'-1' is not a whole number, at least 1"),
        (["--shape", "64", "31"], "error: --shape 64 31 is too small: use at least 32 32."),
        (["--device", "nowhere"], "--device nowhere is no device: use cpu, cuda or cuda:N."),
        (["--device", "cuda:63"], "--device cuda:63 is not there"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(exit_code, capsys, argv, sentence):
    assert exit_code("backbone", *argv) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err.splitlines()[-1]
    assert captured.out == ""
