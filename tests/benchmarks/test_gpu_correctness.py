"""The checks of correctness hold, and each of them fails when its kernel is broken."""

import json

import check_activations
import check_monarch
import check_steps
import correctness
import pytest
import torch
from checks import Check, Finding, differing, relative_error

from apex_composer import triton_kernels
from apex_composer.model.fused_swiglu import FusedSwiGLU
from apex_composer.operators.stage_operators import StageOperators
from apex_composer.ops import monarch, reference

NORMS = "apex_composer.triton_kernels.norms.unit_square_sums"


def named(checks, *words: str) -> list[Check]:
    found = [check for check in checks if all(word in check.what for word in words)]
    assert found
    return found


def wrong(checks: list[Check]) -> set[str]:
    """Names of the findings that do not hold."""
    return {f.what for check in checks for f in check.run() if not f.holds}


def test_the_kernels_pass_and_the_result_is_written(tmp_path, device, monkeypatch, capsys):
    kept = ("[2, 9, 4, 6] float16", "[3, 5, 7] float16", "axis 1 tf32x3", "scores", "waits")
    whole = correctness.all_checks

    def some_checks(*arguments, **settings):
        pairs = whole(*arguments, **settings)
        return (pair for pair in pairs if any(words in pair[0].what for words in kept))

    monkeypatch.setattr(correctness, "all_checks", some_checks)
    path = tmp_path / "correctness.json"
    assert correctness.main(["--device", str(device), "--small", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["complete"] and len(content["lines"]) == len(kept)
    for line in content["lines"]:
        assert line["met"] and line["findings"]
        assert {"what", "error", "bound"} == set(line["findings"][0])
    assert "K3 SwiGLU [3, 5, 7] float16" in capsys.readouterr().out
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_shape_of_the_real_models_is_checked(device):
    shapes = {(s.n, s.axis) for s in check_monarch.TINYLLAMA + check_monarch.LLAMA_2_7B}
    assert shapes == {(n, axis) for n in (704, 256, 64, 1376, 512) for axis in (0, 1)}
    assert any(shape.width % 16 for shape in check_monarch.ODD)
    names = [check.what for check, _ in correctness.all_checks(device, small=False)]
    assert len(set(names)) == len(names)
    for words in ("bfloat16", "float16", "float32"):
        assert any(name.startswith("K2") and words in name for name in names)


def test_what_cannot_be_right_is_not():
    nan = float("nan")
    assert not Finding("", nan, 1.0).holds and Finding("", 0.0, 0.0).holds
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert differing(torch.tensor([1.0, nan, 2, 3]), torch.tensor([1.0, nan, nan, 4])) == 0.5


def test_a_broken_fold_is_found(device, monkeypatch):
    checks = named(check_monarch.checks(device, small=True), "axis 0 tf32x3")
    fold = triton_kernels.MonarchBatch.fold
    monkeypatch.setattr(triton_kernels.MonarchBatch, "fold", lambda batch, sign=1: None)
    assert wrong(checks) == {"fold: W[N]"}

    def writes_too_much(batch, sign=1):
        fold(batch, sign)
        batch._tensors[0][0].add_(1e-3)

    monkeypatch.setattr(triton_kernels.MonarchBatch, "fold", writes_too_much)
    assert "fold: other rows that changed" in wrong(checks)


def test_a_broken_gradient_map_is_found(device, monkeypatch):
    checks = named(check_monarch.checks(device, small=True), "axis 1 tf32x3")
    whole, calls = triton_kernels.MonarchBatch.map_gradient, []

    def other_every_time(batch, gradients):
        lefts, rights = whole(batch, gradients)
        calls.append(len(calls))
        return [left + 1e-4 * len(calls) for left in lefts], rights

    monkeypatch.setattr(triton_kernels.MonarchBatch, "map_gradient", other_every_time)
    assert wrong(checks) == {"map: dL", "map: other bits in a second run"}


def test_products_of_torch_in_tf32_are_found(device, monkeypatch):
    checks = named(check_monarch.checks(device, small=True), "axis 0 tf32x3")

    def tf32(tensor):  # 10 bits of mantissa
        return tensor + 2**13 * tensor - 2**13 * tensor if tensor.dtype == torch.float32 else tensor

    for module in (monarch, reference):
        monkeypatch.setattr(module, "bmm", lambda one, other: torch.bmm(tf32(one), tf32(other)))
    names = ["fold by torch: W[N]", *(f"map by torch: {name}" for name in ("dL", "dR", "G[P]"))]
    assert wrong(checks) == set(names)


def test_broken_norms_are_found(device, monkeypatch):
    checks = named(check_activations.checks(device, small=True), "K2", "[3, 7, 5, 1] float16")
    whole = triton_kernels.unit_square_sums

    def ignores_the_mask(activation, unit_size, mask=None, out=None):
        return whole(activation.nan_to_num(9.0), unit_size, None, out)

    monkeypatch.setattr(NORMS, ignores_the_mask)
    assert wrong(checks) == {"masked sums"}


def test_a_broken_swiglu_is_found(device, monkeypatch):
    checks = named(check_activations.checks(device, small=True), "K3", "[3, 5, 7] float16")

    def rounds_once(gate, up, square_sums=None, mask=None):
        product = (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)
        if square_sums is not None:
            square_sums.fill_(1.0)
        return product

    monkeypatch.setattr(check_activations, "swiglu_kernel", lambda: rounds_once)
    assert {"products that differ from eager mode's", "sums", "masked sums"} <= wrong(checks)


def test_wrong_training_and_wrong_scores_are_found(device, monkeypatch):
    checks = list(check_steps.checks(device, small=True))
    nothing = lambda batch, gradients: ([None] * len(gradients),) * 2  # noqa: E731
    monkeypatch.setattr(triton_kernels.MonarchBatch, "map_gradient", nothing)
    monkeypatch.setattr(NORMS, lambda a, size, mask=None, out=None: out.normal_())
    assert {"kernels: scores that differ", "kernels: sums of norms"} <= wrong(
        named(checks, "scores of an assessment")
    )
    assert wrong(named(checks, "training by kernels")) == {
        f"{arm}: {what}"
        for arm in ("apex_kernels", "apex_kernels_fused")
        for what in ("weights", "operators")
    }


def test_waiting_for_the_device_is_found(device, monkeypatch):
    checks = named(check_steps.checks(device, small=True), "never waits")
    after_step = StageOperators.after_step

    def looks_at_a_value(running):
        running.operators[0].site.weight.sum().item()
        after_step(running)

    monkeypatch.setattr(StageOperators, "after_step", looks_at_a_value)
    names = {what.split(":")[0] for what in wrong(checks)}
    assert names == {"apex_torch", "apex_kernels", "apex_kernels_fused"}


def test_tf32_is_allowed_during_the_checks_only(device, monkeypatch):
    matmul = torch.backends.cuda.matmul
    check = Check("flag", lambda: [Finding("off", float(not matmul.allow_tf32), 0.0)])
    monkeypatch.setattr(correctness, "all_checks", lambda device, small: [(check, True)])
    report = correctness.run(device)
    assert report.lines[0]["met"] and report.facts["allow_tf32"] and not matmul.allow_tf32


def test_what_raises_or_finds_no_time_has_failed(device, monkeypatch):
    def broken() -> list[Finding]:
        raise ValueError("an illegal memory access\nand more")

    checks = [(Check("good", lambda: [Finding("x", 0.0, 0.0)]), True), (Check("bad", broken), True)]
    monkeypatch.setattr(correctness, "all_checks", lambda device, small: checks)
    lines = correctness.run(device).lines
    assert [line["met"] for line in lines] == [True, False]
    assert lines[1]["found"] == "ValueError: an illegal memory access"
    assert [line["met"] for line in correctness.run(device, budget=-1).lines] == [False, False]
    assert correctness.main(["--device", str(device)]) == 1


def test_fused_swiglu_is_taken_off_again(device):
    """What the checks of whole steps leave behind would be part of the next one."""
    sizes = check_steps.Namespace(**check_steps.SMALL)
    model = check_steps.build_model(sizes, device, "eager")
    training = check_steps.Training(model, device, microbatch=2, precision="fp32")
    ids = check_steps._ids(sizes, 2, device)
    with training.running(check_steps.ARMS["apex_kernels_fused"], ids) as (_, expander):
        assert expander.operators and FusedSwiGLU(model, "auto") is not None
    for module in model.modules():
        assert not module._forward_pre_hooks and "forward" not in module.__dict__
    assert not training._optimizer._optimizer_step_pre_hooks
