"""Muon against its author's algorithm in float64, and in whole runs."""

import math

import pytest
import torch
from composer import Callback
from composer.models import HuggingFaceModel
from composer.optim import LinearScheduler
from composer_run import assert_same_weights, make_trainer, run
from helpers import tiny_llama
from llmfoundry.utils.builders import build_optimizer
from matrix_optimizers import optimizer_of
from pytorch_optimizer import Muon as PackagesMuon
from tiny_models import CONFIGURATIONS, tiny_model
from transformers.pytorch_utils import Conv1D

from apex_composer import APEX
from apex_composer.extras import MissingExtraError
from apex_composer.methods.matrix_groups import add_matrix_group
from apex_composer.methods.muon import Muon

SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "adamw_lr": 1e-2, "adamw_wd": 0.2, "adamw_eps": 1e-8}
RUN = {"optimizer": optimizer_of(Muon), "settings": SETTINGS}


def newton_schulz(matrix):
    """Five steps of the quintic on the singular values, which is all that they change."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


class Reference:
    """One weight's steps."""

    def __init__(self, matrix: bool):
        self.matrix, self.t, self.b, self.m, self.v = matrix, 0, 0.0, 0.0, 0.0

    def step(self, w, g):
        self.t += 1
        if self.matrix:
            self.b = 0.95 * self.b + 0.05 * g
            u = newton_schulz(0.05 * g + 0.95 * self.b)
            return (1 - 0.02 * 0.1) * w - 0.02 * math.sqrt(max(1, w.shape[0] / w.shape[1])) * u
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.95 * self.v + 0.05 * g * g
        u = self.m / (1 - 0.9**self.t) / ((self.v / (1 - 0.95**self.t)).sqrt() + 1e-8)
        return (1 - 1e-2 * 0.2) * w - 1e-2 * u


def test_three_steps_are_those_of_its_author():
    """Matrices to what bfloat16 leaves of Newton-Schulz, all others to float64's rounding."""
    torch.manual_seed(0)
    shapes = {"wide": (24, 40), "tall": (60, 20), "bias": (5,), "embedding": (9, 4)}
    matrices = ["wide", "tall"]
    start = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    weights = {name: torch.nn.Parameter(weight.clone()) for name, weight in start.items()}
    groups = [
        {"params": [weights["bias"], weights["embedding"]]},
        {"params": [weights[name] for name in matrices], "matrices": True},
    ]
    optimizer = Muon(groups, **SETTINGS)
    references = {name: Reference(name in matrices) for name in shapes}
    for _ in range(3):
        gradients = {n: torch.randn(shape, dtype=torch.float64) for n, shape in shapes.items()}
        for name, weight in weights.items():
            weight.grad = gradients[name].clone()
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        optimizer.step()
        for name, weight in weights.items():
            expected = references[name].step(before[name], gradients[name])
            error = (weight.detach() - expected).norm() / (expected - before[name]).norm()
            assert error < (0.02 if name in matrices else 1e-9), name


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def batch_start(self, state, logger):
        self.seen.append([group["lr"] for group in state.optimizers[0].param_groups])


def test_both_learning_rates_follow_the_schedule():
    rates = Rates()
    run(**RUN, callbacks=(rates,), schedulers=LinearScheduler(alpha_f=0.5))
    for batch, (adamw, muon) in enumerate(rates.seen):
        factor = 1 - max(batch - 1, 0) / 12  # Composer's schedulers are a batch behind
        assert adamw == pytest.approx(1e-2 * factor) and muon == pytest.approx(0.02 * factor)


def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path):
    """And a matrix has one moment only."""
    _, weights, _ = run(**RUN, save_folder=str(tmp_path), save_interval="1ba")
    path = tmp_path / "ep0-ba3-rank0.pt"
    resumed = run(model=tiny_llama(seed=1), load_path=str(path), **RUN)[1]
    assert_same_weights(resumed, weights)
    (saved,) = torch.load(path, weights_only=False)["state"]["optimizers"].values()
    kinds = {name: set(own) for name, own in saved["state"].items()}
    for name, kind in kinds.items():
        assert kind == ({"momentum_buffer"} if "proj" in name else {"exp_avg", "exp_avg_sq"})
    assert sum("proj" in name for name in kinds) == 14


def test_apex_follows_it_and_asks_for_the_operators_rate():
    plain = run(APEX(expansion=False, stages=1, threshold=0.25), **RUN)[1]
    assert_same_weights(plain, run(**RUN)[1])
    with pytest.warns(UserWarning, match="operator_lr_scale: not given.*Muon"):
        run(APEX(stages=1, threshold=0.25), **RUN)
    with pytest.raises(ValueError, match="the optimizer is Muon, allowed"):
        make_trainer(APEX(trainable="selected"), **RUN)


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("lr", True, "a finite number of 0 or more"),
        ("lr", None, "a finite number of 0 or more"),
        ("adamw_lr", float("nan"), "a finite number of 0 or more"),
        ("adamw_wd", "0.1", "a finite number of 0 or more"),
        ("momentum", 1, r"a number in \[0, 1\)"),
        ("adamw_betas", [0.9], r"two numbers in \[0, 1\)"),
        ("ns_steps", 1.5, "a positive int"),
        ("nesterov", "no", "true, false"),
    ],
)
def test_settings_are_checked_at_construction(setting, value, allowed):
    """The package takes most of these."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(3, 4))], "matrices": True}]
    with pytest.raises(ValueError, match=f"^muon: {setting}: got .*, allowed: {allowed}"):
        Muon(groups, **{setting: value})


def test_weights_of_inputs_by_outputs_are_refused():
    """The factor of a shape would be that of the transposed one, without a word."""
    for kind in CONFIGURATIONS:
        own = add_matrix_group({"optimizer": {"name": "muon"}})["optimizer"]
        model = HuggingFaceModel(tiny_model(kind), tokenizer=None)
        if any(isinstance(module, Conv1D) for module in model.modules()):
            with pytest.raises(ValueError, match=r"muon: got weights .* \(GPT-2\), allowed"):
                build_optimizer(model, own.pop("name"), own)
        else:
            assert len(build_optimizer(model, own.pop("name"), own).param_groups) == 2


def test_what_cannot_be_is_refused(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(3, 4))
    groups = [{"params": [weight], "matrices": True}]
    with pytest.raises(TypeError, match="optimizer: muon: unknown key 'momentun'. Did you mean"):
        Muon(groups, momentun=0.9)
    optimizer = Muon(groups)
    assert isinstance(optimizer, PackagesMuon)
    weight.data, weight.grad = torch.ones(6), torch.ones(6)
    with pytest.raises(ValueError, match="muon: got a weight that is sharded, allowed: one"):
        optimizer.step()
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    monkeypatch.setattr("apex_composer.extras._is_installed", lambda name: False)
    with pytest.raises(MissingExtraError, match="optimizer: muon needs pytorch_optimizer, which"):
        Muon(groups)
