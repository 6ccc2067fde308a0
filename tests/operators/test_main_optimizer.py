"""Optimizers that the operators can follow, and those that are refused before a weight moves."""

import warnings

import pytest
import torch
from attaching import LR, make_expander, refused, warned_about
from helpers import cross_entropy, linear_site, tiny_llama, tiny_qwen, tokens
from torch.optim import ASGD, SGD, Adafactor, Adam, AdamW, NAdam, Optimizer
from transformers.optimization import Adafactor as HuggingFaceAdafactor

from apex_composer import Expander, find_sites
from apex_composer.operators.main_optimizer import followed, param_group_places


class ThreeBetas(AdamW):
    """As Adan has them."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=LR)
        self.param_groups[0]["betas"] = (0.9, 0.95, 0.99)


class Lion(AdamW):
    """Known by its name, although it has betas."""


class AdamWScheduleFree(AdamW):
    """Known by its name."""


class TwoModes(AdamW):
    """Known by the methods that ScheduleFree's optimizers have."""

    def train(self):
        """As a module's."""

    def eval(self):
        """As a module's."""


class Wrapper(AdamW):
    """Might keep weights in another precision."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, lr)
        self.optimizer = AdamW(self.param_groups, lr)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (HuggingFaceAdafactor, "lr of Adafactor is None, allowed with apex: a finite number"),
        (lambda p: Adafactor(p, lr=LR), r"eps of Adafactor is \(None, 0\.001\), allowed .*AdamW"),
        (ThreeBetas, r"betas of ThreeBetas is \(0\.9, 0\.95, 0\.99\), allowed with apex: two"),
        (lambda p: AdamW(p, lr=torch.tensor(float("inf"))), r"lr of AdamW is tensor\(inf\)"),
    ],
    ids=["lr", "eps", "betas", "tensor"],
)
def test_settings_that_adamw_has_not_are_refused(make, told):
    model = tiny_llama(layers=1)
    refused(model, make(model.parameters()), told)


@pytest.mark.parametrize(
    "make",
    [
        AdamWScheduleFree,
        TwoModes,
        Wrapper,
        ASGD,
    ],
    ids=["ScheduleFree", "modes", "wrapper", "averaged SGD"],
)
def test_optimizers_with_weights_of_their_own_are_refused(make):
    model = tiny_llama(layers=1)
    refused(model, make(model.parameters(), lr=LR), "keeps weights of its own.*Use AdamW")


def test_groups_without_expanded_weights_may_have_any_settings():
    model = tiny_llama(layers=1)
    expanded = {id(site.weight) for site in find_sites(model)}
    own = [p for p in model.parameters() if id(p) in expanded]
    others = [p for p in model.parameters() if id(p) not in expanded]
    optimizer = AdamW([{"params": own}, {"params": others, "eps": (1e-8, 1e-8)}], lr=LR)
    make_expander(model).attach(optimizer)


@pytest.mark.parametrize("make", [SGD, Lion])
def test_learning_rates_of_another_size_are_warned_about(make):
    (told,) = warned_about(make)
    assert told.startswith("operator_lr_scale: not given") and make.__name__ in told
    assert warned_about(make, operator_lr_scale=1.0) == []


def test_a_plain_run_with_a_stage_of_operators_is_checked_when_they_begin():
    """Attaching checks nothing where stages have no operators, as long as that is so."""
    model = tiny_llama(layers=1)
    for make, told in ((SGD, "operator_lr_scale: not given"), (AdamWScheduleFree, "of its own")):
        expander = make_expander(model, expansion=False)
        expander.attach(make(model.parameters(), lr=LR))
        with pytest.raises((UserWarning, ValueError), match=told), warnings.catch_warnings():
            warnings.simplefilter("error")
            expander.begin_stage(expansion=True)
        assert not expander.operators and not expander.executors


def test_learning_rates_are_warned_about_once():
    model = tiny_llama(layers=1)
    expander = make_expander(model)
    with pytest.warns(UserWarning, match="operator_lr_scale"):
        expander.attach(SGD(model.parameters(), lr=LR))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expander.begin_stage()


@pytest.mark.parametrize("make", [Adam, AdamW, NAdam])
def test_adams_relatives_are_followed_without_a_word(make):
    assert warned_about(make) == []


def train(make, sign: int = 1) -> dict[str, torch.Tensor]:
    """Weights and factors after two steps."""
    model = tiny_llama(layers=1, dtype=torch.float64)
    expander, optimizer = make_expander(model), make(model.parameters())
    expander.attach(optimizer)
    for step in range(2):
        optimizer.zero_grad()
        ids = tokens(2, seed=step)
        (sign * cross_entropy(model(ids).logits, ids)).backward()
        optimizer.step()
    state = expander.state_dict()["factors"]
    factors = {f"{n}.{i}": f for n, pair in state.items() for i, f in enumerate(pair)}
    return {**model.state_dict(), **factors}


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_maximizing_is_minimizing_the_opposite():
    found = train(lambda p: AdamW(p, lr=LR, maximize=True), sign=-1)
    assert_same(found, train(lambda p: AdamW(p, lr=LR)))


def test_a_learning_rate_may_be_a_tensor():
    found = train(lambda p: AdamW(p, lr=torch.tensor(LR, dtype=torch.float64), foreach=False))
    for name, value in train(lambda p: AdamW(p, lr=LR)).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_a_setting_that_is_missing_is_adamws():
    assert followed({"lr": 0.5}, 2.0) == {
        "lr": 1.0,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "maximize": False,
    }


def test_places_of_weights_in_the_param_groups():
    sites = [linear_site(9, 3, name=f"layer.{place}.weight") for place in range(3)]
    first, second, third = (site.weight for site in sites)
    main = SGD([{"params": [third]}, {"params": [first, second]}], lr=LR)
    assert param_group_places(sites, main) == [1, 1, 0]
    with pytest.raises(ValueError, match=r"^layer\.1\.weight is not trained by the optimizer"):
        param_group_places(sites, SGD([first, third], lr=LR))
    first.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^layer\.0\.weight is not trained .*`targets`"):
        param_group_places(sites, main)


@pytest.mark.parametrize("how", ["frozen", "left out"])
def test_a_bias_that_is_not_trained_with_its_weight_is_refused(how):
    """Qwen2's: it would move all the same, and the operators' gradients would lack its part."""
    model = tiny_qwen()
    bias = model.model.layers[1].self_attn.k_proj.bias
    own = [p for p in model.parameters() if how == "frozen" or p is not bias]
    bias.requires_grad_(how != "frozen")
    expander = Expander(find_sites(model), threshold=0.25, kv_heads="expand", method="random")
    told = r"^the bias of model\.layers\.1\.self_attn\.k_proj\.weight is not trained"
    with pytest.raises(ValueError, match=told):
        expander.attach(AdamW(own, lr=LR))


def test_a_bias_in_a_group_of_its_own_follows_its_weights_group():
    model = tiny_qwen()
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    weights = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    optimizer = AdamW([{"params": biases, "lr": 0.0}, {"params": weights}], lr=LR)
    expander = make_expander(model)
    expander.attach(optimizer)
    cross_entropy(model(tokens(2)).logits, tokens(2)).backward()
    optimizer.step()
    assert all(operator.factors.left.abs().max() > 0 for operator in expander.operators)


class Unfollowed(Optimizer):
    """Gradient descent whose settings change to what AdamW does not take."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(parameter.grad, alpha=-LR)
        self.param_groups[0]["betas"] = None


def test_an_error_of_the_operators_optimizer_leaves_effective_weights():
    model = tiny_llama(layers=1)
    expander, optimizer = make_expander(model), Unfollowed(model.parameters(), lr=LR)
    with pytest.warns(UserWarning, match="operator_lr_scale"):
        expander.attach(optimizer)
    cross_entropy(model(tokens(2)).logits, tokens(2)).backward()
    with pytest.raises(TypeError):
        optimizer.step()
    assert expander.running.folded
