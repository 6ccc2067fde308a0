"""All arms run on one model, which is what it was afterwards; ratios follow from known times."""

import json

import pytest
import step_results
import torch
import training_step
from arms import ARMS
from machine import peak_flops
from report import Report
from torch.nn import Linear

TINY = (
    "--layers 1 --hidden 32 --channels 24 --heads 8 --kv-heads 8 --vocabulary 64 --length 8 "
    "--sequences 1 --microbatch 1 --precision fp32 --warmup 0 --rounds 1"
).split()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The script's result, its folder of profiles, and the training that it built."""
    from apex_composer.triton_kernels.availability import interpreted

    folder, trainings = tmp_path_factory.mktemp("step"), []
    whole = training_step.Training

    def kept(*arguments, **settings):
        trainings.append(whole(*arguments, **settings))
        return trainings[-1]

    training_step.Training = kept
    arguments = [*TINY, "--device", "cpu" if interpreted() else "cuda"]
    arguments += ["--json", str(folder / "step.json"), "--profile", "missed"]
    try:
        assert training_step.main([*arguments, "--profiles", str(folder / "profiles")]) == 0
    finally:
        training_step.Training = whole
    return json.loads((folder / "step.json").read_text()), folder / "profiles", trainings[0]


def test_every_arm_is_timed_and_compared(measured):
    content, _, training = measured
    assert content["complete"]
    parameters = sum(p.numel() for p in training.model.parameters())
    assert content["facts"]["parameters"] == parameters
    matrices = sum(m.weight.numel() for m in training.model.modules() if isinstance(m, Linear))
    assert content["facts"]["flops_per_token"] == 6 * matrices + 12 * 1 * 32 * 8
    for name in ARMS:
        seconds = content["facts"]["measured"][name]["seconds"]
        assert len(seconds) == 1 and seconds[0] > 0
    names = {line["what"] for line in content["lines"]}
    assert names >= set(ARMS) | {f"{name}: peak memory" for name in ARMS}
    for base in ("vanilla", "vanilla_fused"):
        assert names >= {f"{name} / {base}" for name in ARMS if name != base}


def test_the_model_is_given_back(measured):
    """What an arm left behind would be part of the next one's times."""
    model, optimizer = measured[2].model, measured[2]._optimizer
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    for module in model.modules():
        assert not module._forward_pre_hooks and "forward" not in module.__dict__
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_a_missed_target_is_profiled_beside_its_base(measured):
    content, folder, _ = measured
    missed = [line for line in content["lines"] if line["met"] is False]
    assert missed  # interpreted kernels are slow
    text = (folder / "apex_kernels.txt").read_text()
    assert "more than in vanilla, in all +" in text and "APEX's own parts by its stopwatch" in text
    assert "aten::" in (folder / "vanilla.txt").read_text()
    assert not (folder / "apex_torch.txt").exists()


def known(**changes) -> dict[str, dict[str, list]]:
    """Two rounds, the second on a machine that has become half as fast, 100 GB each."""
    seconds = {name: 10.0 for name in ARMS} | {"vanilla": 10.2} | changes
    return {
        name: {"seconds": [value, 2 * value], "peak_bytes": [90e9, 100e9]}
        for name, value in seconds.items()
    }


def lines_of(found: dict) -> dict[str, dict]:
    report = Report("training_step")
    report.facts |= {"flops_per_token": 2e9, "peak_flops": 1e14, "peak_source": "a table"}
    step_results.report_arms(report, found, tokens=60_000)
    return {line["what"]: line for line in report.lines} | {"report": report}


def test_ratios_are_taken_round_by_round():
    lines = lines_of(known(apex_kernels_fused=10.02, apex_kernels=10.302))
    fused = lines["apex_kernels_fused / vanilla_fused"]
    assert fused["ratio"]["median"] == fused["ratio"]["upper_quartile"] == pytest.approx(1.002)
    assert fused["met"] and fused["target"] == "<= +0.3 %"
    assert fused["found"] == "+0.20 % (quartiles +0.20 to +0.20)"
    eager = lines["apex_kernels / vanilla"]
    assert eager["ratio"]["median"] == pytest.approx(1.01) and eager["met"] is False
    assert lines["apex_kernels_fused / vanilla"]["met"]
    assert lines["apex_torch / vanilla"]["met"] is None
    assert step_results.missed_arms(lines["report"]) == ["vanilla", "apex_kernels"]
    mfu = 2e9 * 60_000 / 15 / 1e14
    assert lines["vanilla_fused"]["mfu"] == pytest.approx(mfu)
    assert f"MFU {100 * mfu:.1f} % of 100 TFLOP/s" in lines["vanilla_fused"]["found"]


def test_no_gain_over_eager_vanilla_misses_its_target():
    lines = lines_of(known(vanilla=10.0, apex_kernels_fused=9.95))
    assert lines["apex_kernels_fused / vanilla"]["met"] is False
    assert lines["apex_kernels_fused / vanilla_fused"]["met"]


def test_memory_is_compared_with_the_arm_of_the_same_swiglu():
    found = known()
    found["vanilla_fused"]["peak_bytes"] = [80e9, 80e9]
    found["apex_kernels_fused"]["peak_bytes"] = [82e9, 81e9]
    found["apex_kernels"]["peak_bytes"] = [103e9, 103.5e9]
    found["apex_torch"]["peak_bytes"] = [109e9, 109e9]
    lines = lines_of(found)
    fused, eager = (lines[f"{a}: peak memory"] for a in ("apex_kernels_fused", "apex_kernels"))
    assert fused["extra_share"] == pytest.approx(0.02) and fused["met"]
    assert eager["extra_share"] == pytest.approx(0.035) and eager["met"] is False
    assert lines["apex_torch: peak memory"]["met"] is None


def test_arms_come_at_every_place_equally_often():
    orders = [training_step.order_of(turn) for turn in range(2 * len(ARMS))]
    for place in range(len(ARMS)):
        assert sorted(order[place] for order in orders) == sorted(list(ARMS) * 2)


def test_peaks_are_those_of_the_device_itself():
    assert peak_flops("NVIDIA H200")[0] == pytest.approx(989.5e12)
    assert "H200 SXM" in peak_flops("NVIDIA H200")[1]
    assert peak_flops("NVIDIA H200 NVL")[0] == peak_flops("NVIDIA H100 NVL")[0] < 900e12
    assert peak_flops("NVIDIA A100-SXM4-80GB")[0] == pytest.approx(312e12)
    for unknown in ("NVIDIA GH200 480GB", "NVIDIA H200 MIG 1g.18gb", "CPU (interpreted)"):
        assert peak_flops(unknown)[0] is None


def test_too_little_time_is_an_error(device):
    options = training_step.parse([*TINY, "--budget", "-1"])
    with pytest.raises(RuntimeError, match="no round of all arms was completed"):
        training_step.run(device, options)
