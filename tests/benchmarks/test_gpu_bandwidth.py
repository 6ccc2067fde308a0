"""Bytes are counted right, shares follow from known times, and the script runs."""

import json

import bandwidth
import pytest
import torch
import traffic
from bandwidth_cases import SHAPES, Case
from monarch_case import MonarchCase, Shape
from report import Report
from traffic import Traffic


def test_the_script_measures_every_kernel_and_its_rivals(tmp_path, device):
    path = tmp_path / "bandwidth.json"
    arguments = ["--device", str(device), "--small", "--repeats", "1", "--json", str(path)]
    assert bandwidth.main(arguments) == 0
    content = json.loads(path.read_text())
    lines = content["lines"]
    assert content["complete"] and content["facts"]["copy_bytes_per_second"] > 0
    own = [line for line in lines if line["target"]]
    assert [line["what"][:2] for line in own] == ["K3"] * 3 + ["K2"] * 2 + ["K1"] * 4
    for line in own:
        assert line["seconds"]["median"] > 0 and line["share_of_copy"] > 0
        assert line["passes"] in line["found"]
    for rival, count in (("eager", 3), ("Liger", 3), ("torch", 2), ("bmm", 4)):
        assert sum(line["what"].endswith(f": {rival}") for line in lines) == count


def test_shares_and_ratios_follow_from_the_times(device, monkeypatch):
    def ours():
        pass

    def theirs():
        pass

    times = {ours: [0.004, 0.002, 0.003], theirs: [0.006]}
    monkeypatch.setattr(bandwidth, "device_seconds", lambda f, *_: (times[f], 1e-5))
    copies = {3_000_000: 0.0024, 1_000_000: 0.0006}
    monkeypatch.setattr(bandwidth, "copy_seconds", lambda moved, *_: copies[moved])
    report = Report("bandwidth")
    case = Case("K1", "fold", ours, Traffic("x", 3_000_000, 1_000_000), {"bmm": theirs, "no": None})
    bandwidth.measure(case, report, device, 1)
    own, other, missing = report.lines
    assert own["share_of_copy"] == pytest.approx(0.8) and own["met"]
    assert own["needed_share_of_copy"] == pytest.approx(0.2)
    assert "80.0 % of copy: 0.00 TB/s, 3.000 ms (20.0 % by" in own["found"]
    assert other["times_the_kernels"] == pytest.approx(2) and other["met"] is None
    assert missing["found"] == "no is not installed"
    bandwidth.measure(case._replace(kernel="K2", others={}), report, device, 1)
    assert report.lines[-1]["met"] is False and report.lines[-1]["target"] == ">= 85 % of copy"


@pytest.mark.parametrize(("axis", "fold", "mapped"), [(0, 5, 9), (1, 7, 11)])
def test_bytes_of_dense_sets_are_the_passes(axis, fold, mapped, device):
    shape = Shape("all", 16, 10, 2, 4, axis, matrices=3)
    case = MonarchCase(shape, device)
    case.advantageous = [torch.arange(8, device=device)] * 3
    case.disadvantageous = [torch.arange(8, 16, device=device)] * 3
    dense = 4 * 8 * 10 * 3
    assert traffic.fold(case)[1:] == (fold * dense, 3 * dense)
    assert traffic.map_gradient(case)[1:] == (mapped * dense, 4 * dense)


def test_single_columns_cost_whole_sectors(device):
    case = MonarchCase(Shape("columns", 64, 10, 1, 4, axis=1, matrices=1), device)
    case.advantageous = [torch.tensor([0, 8, 16, 24], device=device)]  # 4 sectors of 32 bytes
    case.disadvantageous = [torch.tensor([32, 33, 34, 40], device=device)]  # 2
    scratch = 4 * (4 * 4 * 10)
    assert traffic.fold(case).moved == (4 + 2 + 2) * 32 * 10 + scratch


def test_the_weights_of_tinyllama_are_all_there():
    counted = [shape for shape in SHAPES if shape.name.startswith("TinyLLaMA")]
    entries = sum(s.n * s.width * s.matrices for s in counted)
    assert entries == 22 * 2048 * (3 * 704 + 2 * 256)


def test_no_group_begins_after_the_time_is_over(device):
    report = bandwidth.run(device, bandwidth.parse(["--small", "--repeats", "1", "--budget", "-1"]))
    assert not report.complete and "not run" in report.lines[-1]["found"]
