"""Parameters and multiply-adds of the presets against those that the paper publishes."""

import pytest

pytest.importorskip("mmengine")

from lf_dense import LaplacianFormer
from lf_dense.benchmark.complexity import count, table
from support.driving import call

# At 224 x 224, with the classifier of 1,000 classes.
PUBLISHED = {
    "tiny": (12.1e6, 2.1e9),
    "small": (25.7e6, 4.8e9),
    "medium": (46.3e6, 7.43e9),
    "large": (63.1e6, 11.2e9),
    "huge": (78.5e6, 15.5e9),
}
CLASSIFIER_PARAMS, CLASSIFIER_MACS = 512 * 1000 + 1000, 512 * 1000


@pytest.mark.parametrize("arch", PUBLISHED)
def test_presets_are_as_large_as_published(arch):
    params, macs = PUBLISHED[arch]
    net = LaplacianFormer(arch)
    counted = count(net, input_size=(224, 224))
    assert counted.params == sum(parameter.numel() for parameter in net.parameters())
    assert counted.params + CLASSIFIER_PARAMS == pytest.approx(params, rel=0.02)
    assert counted.macs + CLASSIFIER_MACS == pytest.approx(macs, rel=0.02)


def test_the_work_of_the_attention_itself():
    counted = count(LaplacianFormer("tiny"))
    assert counted.attention_macs > 0
    assert counted.macs + counted.attention_macs + CLASSIFIER_MACS == pytest.approx(2.3e9, rel=0.04)


def test_the_work_is_linear_in_the_pixels():
    net = LaplacianFormer("tiny")
    work = [sum(count(net, input_size=(size, size))[1:]) for size in (224, 448, 896)]
    assert work[1] / work[0] == pytest.approx(4, rel=0.04)
    assert work[2] / work[1] == pytest.approx(4, rel=0.02)


def test_the_table_has_a_line_for_every_preset():
    head, rule, *rows = table(["tiny", "small"]).splitlines()
    assert head.startswith("| arch | depths | params | FLOPs ")
    assert {line.count("|") for line in (head, rule, *rows)} == {6}
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:2] for row in cells] == [["tiny", "(2, 2, 2, 2)"], ["small", "(3, 3, 10, 3)"]]
    for arch, _, params, macs, with_attention in cells:
        wanted_params, wanted_macs = PUBLISHED[arch]
        assert float(params.removesuffix(" M")) * 1e6 == pytest.approx(wanted_params, rel=0.02)
        assert float(macs.removesuffix(" G")) * 1e9 == pytest.approx(wanted_macs, rel=0.02)
        assert float(with_attention.removesuffix(" G")) > float(macs.removesuffix(" G"))


def test_the_tool_prints_the_table():
    assert call("get_flops.py", "--arch", "tiny", "--shape", 64, 96) == f"{table(['tiny'], (64, 96))}\n"
