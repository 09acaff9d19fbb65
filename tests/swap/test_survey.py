"""The survey of packaged configs: what is checked, in which processes, and what is written about it."""

import csv
import json
import os
import re
import time
from functools import partial
from importlib.metadata import packages_distributions, version
from types import SimpleNamespace

import pytest

from support import ROOT
from support.driving import call, refusal

pytest.importorskip("mmengine")

from lf_dense.errors import UsageError
from lf_dense.swap import report as report_module
from lf_dense.swap import survey, workers
from lf_dense.swap.report import report, summary, write_report
from lf_dense.swap.rows import (
    BUILT,
    FAILED,
    NO_BASELINE,
    NO_MODEL,
    REFUSED,
    SWAPPED,
    Finding,
    Row,
    read_rows,
    write_rows,
)
from lf_dense.swap.survey import SwapCheck, one_per_model, packaged_configs, select_configs
from lf_dense.swap.workers import check_in_processes, check_one

# One of each kind of neck and head, and of each way to read a backbone.
SAMPLE = (
    "centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py",
    "conditional_detr/conditional-detr_r50_8xb2-50e_coco.py",
    "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py",
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py",
    "reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py",
    "rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py",
    "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py",
    "solov2/solov2-light_r18_fpn_ms-3x_coco.py",
    "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py",
    "ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py",
    "yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py",
    "yolox/yolox_nano_8xb8-300e_coco.py",
    "fastfcn/fastfcn_r50-d32_jpu_enc_4xb2-80k_cityscapes-512x1024.py",
    "knet/knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512.py",
    "mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py",
    "ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py",
    "ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py",
    "point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py",
    "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py",
    "segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py",
    "segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py",
    "sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024.py",
)


def row(config="a.py", outcome=SWAPPED, detail="", package="mmdet", model="RetinaNet, ResNet"):
    return Row(package, config, model, outcome, detail, 1.5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of configs, in place of every package's."""
    monkeypatch.setattr(survey, "config_folder", lambda package: tmp_path)
    return tmp_path


def write_config(path, head="A", neck="N", **rest):
    settings = {"type": "M", "backbone": {"type": "B"}, "neck": {"type": neck}, "a_head": {"type": head}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"default_scope = 'mmdet'\nmodel = { ({**settings, **rest})!r}\n")


# Which configs


def test_parts_of_configs_are_no_configs(folder):
    for name in ("b/y.py", "a/x.py", "_base_/models/z.py", "a/_base_/z.py", "a/__init__.py"):
        write_config(folder / name)
    assert packaged_configs("mmdet") == ["a/x.py", "b/y.py"]


def test_configs_are_selected_by_pattern(folder):
    write_config(folder / "a/x.py")
    write_config(folder / "b/y.py")
    everything = [("mmdet", "a/x.py"), ("mmdet", "b/y.py"), ("mmseg", "a/x.py"), ("mmseg", "b/y.py")]
    assert select_configs(["mmdet", "mmseg"]) == everything
    assert select_configs(["mmdet"], ["b/*", "*/z*"]) == [("mmdet", "b/y.py")]
    assert select_configs(["mmdet"], single=True) == [("mmdet", "a/x.py")]
    with pytest.raises(UsageError, match="no config is left"):
        select_configs(["mmdet"], ["c/*"])


def test_a_package_has_to_be_installed():
    with pytest.raises(UsageError, match=r"no_such_package is not installed.*--packages"):
        select_configs(["no_such_package"])


def test_one_per_model(folder):
    write_config(folder / "a.py")
    write_config(folder / "b.py", backbone={"type": "Other"})
    write_config(folder / "c.py", neck="Other")
    write_config(folder / "d.py", head="Other")
    write_config(folder / "e.py", neck="Other", head="Other")
    write_config(folder / "f.py", neck="Other")
    (folder / "g.py").write_text("train_cfg = None\n")
    (folder / "h.py").write_text("_base_ = 'nowhere.py'\n")
    names = [("mmdet", name) for name in packaged_configs("mmdet")]
    assert len(names) == 8
    assert one_per_model(names) == [("mmdet", f"{name}.py") for name in "acde"]


# One config


def test_an_exception_is_a_failure_and_output_is_dropped(capsys):
    def check(package, config):
        print("much text")
        raise RuntimeError("it is\n  broken")

    found = check_one(check, "mmdet", "a.py")
    assert found[:5] == ("mmdet", "a.py", "", FAILED, "RuntimeError: it is broken")
    assert found.seconds >= 0
    assert capsys.readouterr().out == ""


def test_configs_that_do_not_build_say_why(folder, mmdet):
    check = SwapCheck("tiny")
    (folder / "tta.py").write_text("tta_model = dict(type='DetTTAModel')\n")
    assert check("mmdet", "tta.py") == Finding(NO_MODEL)
    (folder / "broken.py").write_text("_base_ = 'nowhere.py'\n")
    outcome, detail, model = check("mmdet", "broken.py")
    assert (outcome, model) == (NO_BASELINE, "")
    assert detail.startswith("UsageError: the config ")
    write_config(folder / "unknown.py", type="NoSuchModel")
    outcome, detail, model = check("mmdet", "unknown.py")
    assert (outcome, model) == (NO_BASELINE, "NoSuchModel, B")
    assert "NoSuchModel" in detail
    assert "the swap refuses it as well: the backbone B of the config does not run here" in detail


def test_a_refusal_is_quoted(mmdet):
    outcome, detail, model = SwapCheck("tiny")("mmdet", "tridentnet/tridentnet_r50-caffe_1x_coco.py")
    assert (outcome, model) == (REFUSED, "TridentFasterRCNN, TridentResNet")
    assert detail.startswith("the backbone cannot be replaced: TridentResNet runs each image in three")


def test_configs_of_one_new_model_run_it_once(mmdet, monkeypatch):
    runs = []

    def run(config, swapped):
        runs.append(swapped.model.backbone.type)
        return Finding(SWAPPED, "a note")

    monkeypatch.setattr(survey, "_run_both", run)
    check = SwapCheck("tiny")
    for name in ("retinanet_r18_fpn_1x_coco.py", "retinanet_r18_fpn_1xb8-1x_coco.py"):
        assert check("mmdet", f"retinanet/{name}") == Finding(SWAPPED, "a note", "RetinaNet, ResNet")
    assert runs == ["LaplacianFormer"]


@pytest.mark.parametrize(
    ("swapped", "original", "found"),
    [
        ({}, {}, Finding(SWAPPED)),
        ({"loss": "x"}, {}, Finding(FAILED, "loss: ValueError: x")),
        ({"predict": "x"}, {"loss": "y"}, Finding(FAILED, "predict: ValueError: x")),
        (
            {"predict": "x"},
            {"predict": "y"},
            Finding(SWAPPED, "no predict, nor in the original (ValueError: y)"),
        ),
        (
            {"loss": "x", "predict": "x"},
            {"loss": "y", "predict": "z"},
            Finding(
                BUILT,
                "no loss, nor in the original (ValueError: y);"
                " no predict, nor in the original (ValueError: z)",
            ),
        ),
    ],
)
def test_the_original_tells_whose_failure_it_is(monkeypatch, swapped, original, found):
    def try_sizes(model, config, mode):
        return ValueError(config[mode]) if mode in config else None

    monkeypatch.setattr(survey, "build_model", lambda config: SimpleNamespace(init_weights=lambda: None))
    monkeypatch.setattr(survey, "try_sizes", try_sizes)
    assert survey._run_both(original, swapped) == found


# Many configs


class Stub:
    """A check that does what the config's name says, and tells its process."""

    def __call__(self, package, config):
        if config == "sleeps":
            time.sleep(600)
        if config == "dies":
            os._exit(1)
        if config == "raises":
            raise ValueError("an ordinary error")
        return Finding(SWAPPED, str(os.getpid()))


def stub_survey(*configs, make_check=Stub, workers=1, timeout=1.0):
    names = [("mmdet", config) for config in configs]
    rows = check_in_processes(names, make_check, workers, timeout, memory_gib=64)
    return {found.config: found for found in rows}


def test_a_process_is_replaced_after_a_time_out_and_after_a_death():
    rows = stub_survey("a", "raises", "b", "sleeps", "c", "dies", "d")
    assert list(rows) == ["a", "raises", "b", "sleeps", "c", "dies", "d"]
    outcomes = {config: found.outcome for config, found in rows.items()}
    failed = {"raises", "sleeps", "dies"}
    assert outcomes == {config: FAILED if config in failed else SWAPPED for config in rows}
    assert rows["raises"].detail == "ValueError: an ordinary error"
    assert rows["sleeps"].detail == "it took longer than the time limit of 1 s"
    assert rows["sleeps"].seconds >= 1
    assert rows["dies"].detail == "its process died (out of memory, or a crash)"
    # An ordinary error keeps the process; a time-out and a death do not.
    assert rows["a"].detail == rows["b"].detail
    assert len({rows[config].detail for config in "bcd"}) == 3


def test_a_process_is_replaced_after_many_configs(monkeypatch):
    monkeypatch.setattr(workers, "CONFIGS_PER_PROCESS", 2)
    rows = stub_survey("a", "b", "c", timeout=60.0)
    assert rows["a"].detail == rows["b"].detail != rows["c"].detail


def test_several_processes_share_the_configs():
    rows = stub_survey(*(f"{index}" for index in range(8)), workers=2, timeout=60.0)
    assert set(rows) == {f"{index}" for index in range(8)}
    assert {found.outcome for found in rows.values()} == {SWAPPED}


def test_a_survey_whose_processes_do_not_start_ends():
    with pytest.raises(UsageError, match=r"does not start.*--memory-gib"):
        stub_survey("a", "b", make_check=partial(os._exit, 1))


def test_no_configs_need_no_process():
    assert stub_survey() == {}


def test_a_survey_goes_on_where_its_log_ended(tmp_path, monkeypatch):
    log = tmp_path / "log.json"
    write_rows(log, [row("other.py"), row("b.py", BUILT)])
    asked = []

    def check(names, *arguments):
        for _, config in names:
            asked.append(config)
            if config == "stop.py":
                raise KeyboardInterrupt
            yield row(config)

    monkeypatch.setattr(survey, "check_in_processes", check)
    told = []
    names = [("mmdet", name) for name in ("a.py", "b.py", "c.py")]
    rows = survey.survey(names, "tiny", 1, 1.0, 1.0, log, told.append)
    assert [found.outcome for found in rows] == [SWAPPED, BUILT, SWAPPED]
    assert asked == ["a.py", "c.py"]
    assert told == ["2/3 mmdet::a.py swapped ", "3/3 mmdet::c.py swapped "]
    # The log keeps what it had of other configs, and what was done before an interruption.
    assert {found.config for found in read_rows(log)} == {"other.py", "a.py", "b.py", "c.py"}
    with pytest.raises(KeyboardInterrupt):
        survey.survey([("mmdet", "d.py"), ("mmdet", "stop.py")], "tiny", 1, 1.0, 1.0, log, told.append)
    assert "d.py" in {found.config for found in read_rows(log)}


# Results


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [row("a.py", detail='a "quoted", | text'), row("b.py", FAILED)._replace(seconds=None)]
    write_rows(tmp_path / "rows.json", rows)
    assert read_rows(tmp_path / "rows.json") == rows


def test_results_of_earlier_versions_are_read(tmp_path):
    """They had seconds as text, and none for a process that died."""
    line = {
        "package": "mmseg",
        "config": "a.py",
        "model": "EncoderDecoder, ResNet",
        "outcome": "swapped",
        "detail": "",
        "seconds": "2.5",
    }
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([line, {**line, "config": "b.py", "outcome": "failed", "seconds": ""}]))
    first, second = read_rows(path)
    assert first == Row("mmseg", "a.py", "EncoderDecoder, ResNet", SWAPPED, "", 2.5)
    assert (second.name, second.outcome, second.seconds) == (("mmseg", "b.py"), FAILED, None)


@pytest.mark.parametrize("text", ["", "3", "{}x", '{"a": 1}', "[1]", '[{"package": "mmdet"}]'])
def test_another_file_is_no_file_of_results(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UsageError, match=r"rows.json is no file of results"):
        read_rows(tmp_path / "rows.json")


HOURGLASS = "the backbone cannot be replaced: HourglassNet stacks hourglasses, and its head reads each."
WHOLE = "the backbone cannot be replaced: {} is a whole network with branches of its own, and more."
ROWS = [
    row("a.py"),
    row("b.py", detail="no loss, nor in the original (ValueError: x)"),
    row("c.py", BUILT, 'a "quoted", | text'),
    row("d.py", REFUSED, HOURGLASS, model="CornerNet, HourglassNet"),
    row("e.py", NO_BASELINE, "ImportError: x"),
    row("f.py", NO_MODEL, model=""),
    *(
        row(f"{name}.py", REFUSED, WHOLE.format(name), "mmseg", f"EncoderDecoder, {name}")
        for name in ("First", "Second", "Third", "Fourth")
    ),
    row("g.py", REFUSED, WHOLE.format("Second"), "mmseg", "EncoderDecoder, Second"),
]


def test_summary_counts_each_package():
    mmdet, mmseg = summary(ROWS).splitlines()
    assert mmdet == (
        "mmdet: 6 configs, 1 without a model, 1 that do not build on their own here; of the other 4:"
        " 2 swapped (50.0%), 1 swapped and built but not run, 1 refused, 0 failed"
    )
    assert mmseg.startswith("mmseg: 5 configs,")
    assert mmseg.endswith("0 swapped (0.0%), 0 swapped and built but not run, 5 refused, 0 failed")
    assert "of the other 0: 0 swapped (0.0%)" in summary([row(outcome=NO_MODEL)])


def test_a_report_is_a_summary_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "_version", lambda package: f"{package} 1.2.3")
    table = write_report(tmp_path / "all.md", ROWS, "small", "2026-01-02")
    assert table == tmp_path / "all.csv"
    with table.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0]) == ["package", "config", "model", "outcome", "detail"]
    assert [tuple(line.values()) for line in lines] == [found[:5] for found in ROWS]

    text = (tmp_path / "all.md").read_text()
    assert max(map(len, text.splitlines())) <= 110
    joined = " ".join(text.split())
    assert "2026-01-02, arch `small`, mmdet 1.2.3, mmseg 1.2.3." in joined
    assert "[all.csv](all.csv)" in joined
    for line in summary(ROWS).splitlines():
        assert f"- {line}" in joined
    for outcome, counts in {
        SWAPPED: "2 | 0 | 2",
        BUILT: "1 | 0 | 1",
        REFUSED: "1 | 5 | 6",
        FAILED: "0 | 0 | 0",
        NO_BASELINE: "1 | 0 | 1",
        NO_MODEL: "1 | 0 | 1",
    }.items():
        assert f"\n| {outcome} | {counts} |" in text
    # Backbones that are refused for one reason share a line, the most frequent first.
    whole = "| 5 | Second, First and 2 more | is a whole network with branches of its own |"
    assert f"{whole}\n| 1 | HourglassNet | stacks hourglasses |\n" in text


def test_long_reasons_are_shortened():
    rows = [row(outcome=REFUSED, detail="the backbone cannot be replaced: " + "a long reason " * 20)]
    (line,) = [line for line in report_module._refusal_table(rows).splitlines() if "long" in line]
    assert len(line) <= 110
    assert line.endswith("... |")


def test_a_report_without_refusals_has_no_table_of_them(monkeypatch):
    monkeypatch.setattr(report_module, "_version", lambda package: f"{package} 1.2.3")
    text = report([row()], "tiny", "2026-01-02", "x.csv")
    assert "| refused | old backbone" not in text
    assert "--packages" not in text
    assert "check_swap.py --packages mmpretrain --out" in report(
        [row(package="mmpretrain")], "tiny", "2026-01-02", "x.csv"
    )


def test_a_report_is_markdown(tmp_path):
    with pytest.raises(UsageError, match=r"has to end in .md"):
        write_report(tmp_path / "all.csv", ROWS, "tiny")
    assert list(tmp_path.iterdir()) == []


# The tool


def test_the_tool_says_what_is_wrong(mmdet, tmp_path):
    assert "no config is left" in refusal("check_swap.py", "--packages", "mmdet", "--only", "nothing*")
    assert "has to end in .md" in refusal("check_swap.py", "--out", tmp_path / "x.txt")


def test_a_failure_is_the_tool_s_exit_code(mmdet, tmp_path):
    log, out = tmp_path / "rows.json", tmp_path / "all.md"
    name = "retinanet/retinanet_r18_fpn_1x_coco.py"
    write_rows(log, [row(name, FAILED, "loss: ValueError: x")])
    printed = call("check_swap.py", "--only", name, "--json", log, "--out", out, code=1)
    assert "1 failed" in printed
    assert name in out.with_suffix(".csv").read_text()


def test_a_sample_of_all_packaged_configs(mmdet, mmseg, tmp_path):
    """docs/swapped_configs.csv has all of them."""
    out = tmp_path / "results.json"
    call("check_swap.py", "--only", *SAMPLE, "--json", out)
    rows = read_rows(out)
    assert len(rows) == len(SAMPLE)
    assert {found.config: found.outcome for found in rows if found.outcome != SWAPPED} == {}


def test_the_table_in_the_documentation_is_whole(mmdet, mmseg):
    with (ROOT / "docs" / "swapped_configs.csv").open(newline="") as stream:
        rows = [Row(**line, seconds=None) for line in csv.DictReader(stream)]
    text = (ROOT / "docs" / "swapped_configs.md").read_text()
    assert [found.name for found in rows if found.outcome == FAILED] == []
    for package in ("mmdet", "mmseg"):
        distribution = packages_distributions()[package][0]
        if f"{distribution} {version(distribution)}" not in " ".join(text.split()):
            pytest.skip(f"the table is of another version of {distribution}")
        names = [found.config for found in rows if found.package == package]
        assert names == packaged_configs(package)
    (date,) = re.findall(r"\d{4}-\d\d-\d\d", text)
    assert text == report(rows, "tiny", date, "swapped_configs.csv")
