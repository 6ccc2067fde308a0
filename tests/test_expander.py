"""The stages of APEX in a plain training loop, and the state that such a loop goes on from."""

import pytest
import torch
from helpers import cross_entropy, exact_norms, tiny_llama, tokens

from apex_composer import Expander, find_sites
from apex_composer.trainable.check import check_model

pytestmark = pytest.mark.numeric

LR, BETAS, EPS = 1e-2, (0.9, 0.95), 1e-8


def make_expander(model, **settings) -> Expander:
    settings = {"threshold": 0.25, "seed": 3, "kv_heads": "expand", **settings}
    expander = Expander(find_sites(model), **settings)
    with torch.no_grad(), expander.assessing():
        model(tokens(8))
    return expander


def make_optimizer(model, decay=0.1):
    return torch.optim.AdamW(model.parameters(), LR, betas=BETAS, eps=EPS, weight_decay=decay)


def plain_step(model, optimizer, ids):
    optimizer.zero_grad()
    cross_entropy(model(ids).logits, ids).backward()
    optimizer.step()


@pytest.mark.parametrize("kv_heads", ["expand", "skip"])
def test_a_stage_begins_and_ends_without_changing_the_function(kv_heads):
    model = tiny_llama(kv_heads=2)
    expander, optimizer, ids = (
        make_expander(model, kv_heads=kv_heads),
        make_optimizer(model),
        tokens(4),
    )
    expander.attach(optimizer)
    with torch.no_grad():
        before = model(ids).logits
        expander.begin_stage()
        assert torch.equal(model(ids).logits, before)
    plain_step(model, optimizer, ids)
    assert any(o.factors.left.abs().max() > 0 for o in expander.operators)
    with torch.no_grad():
        trained = model(ids).logits
        assert not torch.equal(trained, before)
        expander.fuse()
        assert torch.equal(model(ids).logits, trained)
    assert expander.operators == []


def test_two_thousand_folds_drift_by_less_than_1e_5():
    """The base weight must survive being rebuilt by subtraction while T changes every step."""
    model = tiny_llama(layers=1)
    expander = make_expander(model)
    expander.begin_stage()
    base = {s.name: s.weight.detach().clone() for s in expander.sites}
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        for operator in expander.operators:
            operator.unfold()
            noise = torch.randn(operator.factors.left.shape, generator=generator)
            operator.factors.left.mul_(0.9).add_(noise, alpha=0.05)
            operator.fold()
    for operator in expander.operators:
        assert operator.relative_norm() > 0.05
        operator.unfold()
        weight = operator.site.weight
        drift = (weight - base[operator.site.name]).norm() / weight.norm()
        # 4,000 sums that each round to 6e-8 at most, up as often as down: their root is 4e-6.
        assert 0 < drift < 1e-5


def test_model_and_optimizer_keep_their_keys_and_shapes():
    model, vanilla = tiny_llama(), tiny_llama()
    optimizer, vanilla_optimizer = make_optimizer(model), make_optimizer(vanilla)
    expander = make_expander(model)
    expander.attach(optimizer)
    expander.begin_stage()
    for m, o in ((model, optimizer), (vanilla, vanilla_optimizer)):
        plain_step(m, o, tokens(4))

    def shapes(m, o):
        weights = {n: (t.shape, t.dtype) for n, t in m.state_dict().items()}
        return weights, {
            i: {k: v.shape for k, v in s.items()} for i, s in o.state_dict()["state"].items()
        }

    assert shapes(model, optimizer) == shapes(vanilla, vanilla_optimizer)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in vanilla.named_modules()]
    assert optimizer.state_dict()["param_groups"] == vanilla_optimizer.state_dict()["param_groups"]


def test_state_survives_torch_save_and_continues_bit_for_bit(tmp_path):
    model = tiny_llama(kv_heads=2)
    expander, optimizer = make_expander(model), make_optimizer(model)
    expander.attach(optimizer)
    expander.begin_stage()
    for step in range(3):
        with expander.assessing():
            plain_step(model, optimizer, tokens(4, seed=step))
    file = tmp_path / "state.pt"
    torch.save([model.state_dict(), optimizer.state_dict(), expander.state_dict()], file)
    weights, optimizer_state, state = torch.load(file, weights_only=True)

    resumed = tiny_llama(seed=1, kv_heads=2)
    resumed.load_state_dict(weights)
    resumed_optimizer = make_optimizer(resumed)
    resumed_optimizer.load_state_dict(optimizer_state)
    other = Expander(find_sites(resumed), threshold=0.25, seed=3, kv_heads="expand")
    other.load_state_dict(state)
    other.attach(resumed_optimizer)
    for m, e, o in ((model, expander, optimizer), (resumed, other, resumed_optimizer)):
        for step in range(3, 6):
            plain_step(m, o, tokens(4, seed=step))
        e.begin_stage()
        plain_step(m, o, tokens(4, seed=9))
    assert other.history == expander.history
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    "setting, now",
    [
        ("threshold", 0.125),
        ("seed", 4),
        ("kv_heads", "skip"),
        ("method", "average"),
        ("expansion", False),
    ],
)
def test_resuming_with_another_setting_names_both_values(setting, now):
    model = tiny_llama(kv_heads=2)
    expander = make_expander(model)
    expander.begin_stage()
    settings = {"threshold": 0.25, "seed": 3, "kv_heads": "expand", setting: now}
    other = Expander(find_sites(model), **settings)
    saved = expander.state_dict()["settings"][setting]
    with pytest.raises(ValueError, match=rf"{setting}: .*{saved!r}.*{now!r}"):
        other.load_state_dict(expander.state_dict())


def test_the_same_seed_selects_and_draws_the_same():
    first, second = (make_expander(tiny_llama()) for _ in range(2))
    for expander in (first, second):
        expander.begin_stage()
    assert first.history == second.history
    for a, b in zip(first.operators, second.operators, strict=True):
        assert torch.equal(a.factors.right, b.factors.right)
    rights = {o.site.name: o.factors.right.flatten()[0].item() for o in first.operators}
    assert len(set(rights.values())) == len(rights)  # every weight has its own T


def test_without_expansion_there_are_selections_but_no_operators():
    model, twin = tiny_llama(), tiny_llama()
    expander, optimizer = make_expander(model, expansion=False), make_optimizer(model)
    twin_optimizer = make_optimizer(twin)
    expander.attach(optimizer)
    expander.begin_stage()
    assert expander.selections and expander.operators == []
    plain_step(model, optimizer, tokens(4))
    plain_step(twin, twin_optimizer, tokens(4))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, twin.state_dict()[name])


def test_a_stage_is_numbered_and_its_record_tells_where_it_began():
    """A trainer whose run goes on elsewhere names the stage and the batch; a plain loop neither."""
    expander = make_expander(tiny_llama(layers=1), method="random")
    expander.begin_stage()
    expander.begin_stage(stage=5, batch=120)
    expander.begin_stage(False)
    assert [record["stage"] for record in expander.history] == [0, 5, 6] and expander.stage == 6
    assert [record.get("start_batch") for record in expander.history] == [None, 120, None]
    assert "start_batch" not in expander.history[0] and not expander.operators


@pytest.mark.parametrize("kv_heads", ["auto", "expand"])
def test_checking_a_model_leaves_no_hooks_and_finds_what_an_expander_expands(kv_heads):
    model = tiny_llama(kv_heads=2)
    sites, counts, *_ = check_model(find_sites(model), 0.25, kv_heads)
    assert not any(module._forward_pre_hooks for module in model.modules())
    expander = Expander(find_sites(model), threshold=0.25, kv_heads=kv_heads)
    assert [site.name for site in sites] == [site.name for site in expander.sites]
    assert counts == expander.counts
    with pytest.raises(ValueError, match="bfloat16, allowed: float32.*master_weights_dtype"):
        check_model(find_sites(exact_norms(tiny_llama(dtype=torch.bfloat16))), 0.25)


def test_bad_settings_and_models_are_refused():
    model = tiny_llama()
    sites = find_sites(model)
    for threshold in (0, -0.1, 0.51, "a", True):
        with pytest.raises(ValueError, match="threshold: got"):
            Expander(sites, threshold=threshold)
    with pytest.raises(ValueError, match="kv_heads: got 'exand'.*Did you mean 'expand'"):
        Expander(sites, kv_heads="exand")
    for seed in (-1, "a", 2.5, True, None):
        with pytest.raises(ValueError, match="seed: got .*, allowed: an integer of 0 or more"):
            Expander(sites, seed=seed)
    with pytest.raises(ValueError, match="operator_lr_scale: got inf"):
        Expander(sites, operator_lr_scale=float("inf"))
    with pytest.raises(ValueError, match="no sites"):
        Expander([])
    expander = Expander(sites)
    with pytest.raises(RuntimeError, match="no scores"):
        expander.begin_stage()
    with pytest.raises(ValueError, match="not trained by the optimizer"):
        expander.attach(torch.optim.AdamW([model.lm_head.weight]))


def test_operator_lr_scale_scales_the_first_step():
    lefts = []
    for scale in (1.0, 0.5):
        model = tiny_llama(layers=1)
        expander, optimizer = make_expander(model, operator_lr_scale=scale), make_optimizer(model)
        expander.begin_stage()
        expander.attach(optimizer)
        plain_step(model, optimizer, tokens(4))
        lefts.append(expander.operators[0].factors.left)
    torch.testing.assert_close(lefts[0], 2 * lefts[1])


def test_a_step_without_an_optimizer_for_the_operators_is_refused():
    model = tiny_llama(layers=1)
    expander = make_expander(model)
    expander.begin_stage()
    with pytest.raises(RuntimeError, match="call attach"):
        expander.running.before_step()


def test_selecting_without_expansion_needs_no_trained_weights():
    model = tiny_llama(layers=1).requires_grad_(False)
    expander = make_expander(model, expansion=False)
    expander.attach(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    expander.begin_stage()
    assert expander.selections and not expander.operators


def test_the_state_does_not_change_with_later_training():
    expander = make_expander(tiny_llama(layers=1))
    expander.begin_stage()
    state = expander.state_dict()
    state["history"][0]["stage"] = 99
    assert expander.history[0]["stage"] == 0


def test_a_state_saved_before_attaching_is_a_copy_of_what_was_loaded():
    model = tiny_llama(layers=1)
    expander, optimizer = make_expander(model), make_optimizer(model)
    expander.begin_stage()
    expander.attach(optimizer)
    plain_step(model, optimizer, tokens(4))
    saved = expander.state_dict()
    other = make_expander(model)
    other.load_state_dict(saved)
    name, found = next(iter(other.state_dict()["moments"].items()))
    found["exp_avg"].zero_()
    assert saved["moments"][name]["exp_avg"].abs().max() > 0
