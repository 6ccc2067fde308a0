"""GaLore and APOLLO against the papers' algorithms, written out in float64, and in whole runs."""

import copy

import pytest
import torch
from composer.optim import LinearScheduler
from composer_run import assert_same_weights, make_trainer, run
from helpers import tiny_llama
from matrix_optimizers import optimizer_of

from apex_composer import APEX
from apex_composer.methods.low_rank import APOLLO, GaLore

KINDS = {"galore": GaLore, "apollo": APOLLO}
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "rank": 2, "update_proj_gap": 2}
B1, B2, EPS = 0.9, 0.95, 1e-8


class Reference:
    """One weight's steps in plain loops: moments, projection and the norm of the last update."""

    def __init__(self, kind: str, matrix: bool, scale: float, per: str, draws):
        self.kind, self.matrix, self.scale, self.per, self.draws = kind, matrix, scale, per, draws
        self.t, self.m, self.v, self.last = 0, 0.0, 0.0, None

    def direction(self, g):
        self.m = B1 * self.m + (1 - B1) * g
        self.v = B2 * self.v + (1 - B2) * g * g
        return self.m / (1 - B1**self.t) / ((self.v / (1 - B2**self.t)).sqrt() + EPS)

    def step(self, w, g):
        self.t += 1
        update = self.update(g) if self.matrix else self.direction(g)
        return w - SETTINGS["lr"] * update - SETTINGS["lr"] * SETTINGS["weight_decay"] * w

    def update(self, g):
        if g.shape[0] > g.shape[1]:
            return self.wide(g.T).T
        return self.wide(g)

    def wide(self, g):
        if (self.t - 1) % SETTINGS["update_proj_gap"] == 0:
            self.p = next(self.draws)
            if self.kind == "galore":  # vectors of their own, whose sign only is free
                vectors = torch.linalg.eigh(g @ g.T).eigenvectors.flip(1)[:, : SETTINGS["rank"]].T
                self.p = vectors * (vectors * self.p).sum(1, keepdim=True).sign()
        projected = self.p @ g
        n = self.direction(projected)
        if self.kind == "galore":
            return self.scale * self.p.T @ n
        if self.per == "tensor":
            u = g * n.norm() / projected.norm()
        else:
            u = torch.stack(
                [g[:, j] * n[:, j].norm() / projected[:, j].norm() for j in range(g.shape[1])], 1
            )
        if self.last is not None and u.norm() > 1.01 * self.last:
            u = u / u.norm() * 1.01 * self.last
        self.last = u.norm()
        return self.scale * u


@pytest.mark.parametrize(
    ("kind", "per"), [("galore", "channel"), ("apollo", "channel"), ("apollo", "tensor")]
)
def test_five_steps_are_those_of_the_paper(kind, per):
    """Over two projections; gradients that grow, so that APOLLO's limit acts."""
    torch.manual_seed(0)
    shapes = {"wide": (3, 7), "tall": (6, 4), "square": (4, 4), "bias": (5,), "embedding": (9, 4)}
    matrices = [name for name in shapes if name not in ("bias", "embedding")]
    start = {n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items()}
    weights = {name: torch.nn.Parameter(weight) for name, weight in start.items()}
    expected = {name: weight.detach().clone() for name, weight in weights.items()}
    given = {"per": per} if kind == "apollo" else {}
    optimizer = KINDS[kind](
        [
            {"params": [weights[n] for n in shapes if n not in matrices]},
            {"params": [weights[n] for n in matrices], "matrices": True, "scale": 0.3},
        ],
        **SETTINGS,
        **given,
    )
    drawn: dict[str, list] = {name: [] for name in matrices}
    references = {
        name: Reference(kind, name in matrices, 0.3, per, iter(drawn.get(name, [])))
        for name in shapes
    }
    for step in range(5):
        gradients = {n: (1 + step) * torch.randn(s).double() for n, s in shapes.items()}
        for name, weight in weights.items():
            weight.grad = gradients[name].clone()
        optimizer.step()
        for name, weight in weights.items():
            if name in matrices and step % SETTINGS["update_proj_gap"] == 0:
                drawn[name].append(optimizer.state[weight]["projection"].clone())
            expected[name] = references[name].step(expected[name], gradients[name])
            torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-10, atol=1e-12)
            assert torch.equal(weight.grad, gradients[name])


def test_projections_are_drawn_by_seed_step_and_place():
    """With a variance of 1 / rank; without touching the run's random numbers."""

    def projections(seed: int) -> list:
        weights = [torch.nn.Parameter(torch.zeros(400, 500)) for _ in range(2)]
        optimizer = APOLLO([{"params": weights, "matrices": True}], seed=seed, rank=100)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        before = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(before, torch.get_rng_state())
        return [optimizer.state[weight]["projection"] for weight in weights]

    first, second = projections(1)
    assert not torch.equal(first, second) and torch.equal(first, projections(1)[0])
    assert not torch.equal(first, projections(2)[0])
    assert first.shape == (100, 400) and float(first.var()) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_a_gradient_moves_nothing(kind):
    """torch takes one with zeros before it loads a checkpoint."""
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = KINDS[kind]([{"params": [weight], "matrices": True}], rank=2)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.ones(3, 4))
    weight.grad = torch.full_like(weight, 1e-3)
    optimizer.step()
    assert torch.isfinite(weight).all() and not torch.equal(weight, torch.ones(3, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_with_the_same_bits(kind, tmp_path):
    """Within a projection's life and at its end; the state is tensors, and less than AdamW's."""
    options = {"optimizer": optimizer_of(KINDS[kind]), "settings": SETTINGS}
    options["schedulers"] = LinearScheduler(alpha_f=0.1)
    _, weights, _ = run(**options, save_folder=str(tmp_path), save_interval="1ba")
    for batch in (3, 4):
        path = tmp_path / f"ep0-ba{batch}-rank0.pt"
        resumed = run(model=tiny_llama(seed=1), load_path=str(path), **options)[1]
        assert_same_weights(resumed, weights)
    for setting in ("rank", "update_proj_gap", "scale"):
        other = options | {"settings": SETTINGS | {setting: 3}}
        told = f"^{kind}: {setting}: the checkpoint was trained with .*, this run says 3"
        with pytest.raises(ValueError, match=told):
            make_trainer(load_path=str(path), **other)
    (saved,) = torch.load(path, weights_only=False)["state"]["optimizers"].values()
    states = {name.removeprefix("model."): own for name, own in saved["state"].items()}
    assert all(isinstance(t, torch.Tensor) for own in states.values() for t in own.values())
    plain, total = 0, 0
    for name, parameter in tiny_llama().named_parameters():
        size = sum(tensor.numel() for key, tensor in states[name].items() if key != "step")
        plain, total = plain + 2 * parameter.numel(), total + size
        assert size < 2 * parameter.numel() or "proj" not in name
        assert size == 2 * parameter.numel() or "proj" in name
    assert total < 0.6 * plain


@pytest.mark.parametrize("kind", KINDS)
def test_apex_follows_them_and_asks_for_the_operators_rate(kind, tmp_path):
    options = {"optimizer": optimizer_of(KINDS[kind]), "settings": SETTINGS}
    assert_same_weights(
        run(APEX(expansion=False, stages=1, threshold=0.25), **options)[1], run(**options)[1]
    )

    def apex(**settings) -> APEX:
        return APEX(stages=["3ba", "3ba"], threshold=0.25, **settings)

    with pytest.warns(UserWarning, match=f"operator_lr_scale: not given.*{KINDS[kind].__name__}"):
        run(apex(), **options)
    saved = {"save_folder": str(tmp_path), "save_interval": "1ba"}
    _, weights, _ = run(apex(operator_lr_scale=0.1), **options, **saved)
    for batch in (2, 3):
        path = str(tmp_path / f"ep0-ba{batch}-rank0.pt")
        own = [apex(operator_lr_scale=0.1)]
        resumed = run(*own, model=tiny_llama(seed=1), load_path=path, **options)[1]
        assert_same_weights(resumed, weights)
    with pytest.raises(ValueError, match=f"the optimizer is {KINDS[kind].__name__}, allowed"):
        make_trainer(APEX(trainable="selected"), **options)


def test_settings_are_checked_at_construction():
    weight = [{"params": [torch.nn.Parameter(torch.ones(3, 4))], "matrices": True}]
    for kind, given, error, told in (
        (GaLore, {"ranks": 2}, TypeError, "galore: unknown key 'ranks'. Did you mean 'rank'"),
        (GaLore, {"rank": 0}, ValueError, "galore: rank: got 0, allowed: a positive int"),
        (APOLLO, {"scale": -1}, ValueError, "apollo: scale: got -1, allowed: a positive float"),
        (APOLLO, {"per": "row"}, ValueError, "apollo: per: got 'row', allowed: channel, tensor"),
        (APOLLO, {"seed": -1}, ValueError, "apollo: seed: got -1"),
        (GaLore, {"lr": -1.0}, ValueError, "galore: lr: got -1.0, allowed: a finite number of 0"),
        (GaLore, {"betas": (0.9, 1)}, ValueError, r"galore: betas: got \(0.9, 1\), allowed: two"),
        (GaLore, {"betas": [0.9]}, ValueError, r"galore: betas: got \[0.9\], allowed: two numbers"),
        (APOLLO, {"betas": None}, ValueError, "apollo: betas: got None, allowed: two numbers"),
    ):
        with pytest.raises(error, match=told):
            kind(copy.copy(weight), **given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_part_of_a_matrix_is_refused(kind):
    """As FSDP1 leaves it: flat."""
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = KINDS[kind]([{"params": [weight], "matrices": True}])
    weight.data = torch.ones(6)
    weight.grad = torch.ones(6)
    with pytest.raises(ValueError, match=f"{kind}: got a weight that is sharded, allowed: one"):
        optimizer.step()
