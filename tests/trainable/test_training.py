"""Training of some rows equals that by autograd, is resumable, and leaves an ordinary model."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import cross_entropy, factors_now, tokens
from row_oracle import RowOracle
from tiny_models import in_float64, tiny_model
from torch.optim import AdamW

from apex_composer import Expander, find_sites

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS, STAGE = 6, 2


def make_run(model, **settings) -> SimpleNamespace:
    optimizer = AdamW(model.parameters(), **OPTIONS)
    expander = Expander(find_sites(model), kv_heads="expand", **settings)
    expander.attach(optimizer)
    return SimpleNamespace(model=model, optimizer=optimizer, expander=expander)


def loss_of(model, step: int):
    ids = tokens(4, seed=step)
    return cross_entropy(model(input_ids=ids).logits, ids)


def train(run, steps: range):
    for step in steps:
        beginning = step % STAGE == 0
        if beginning:
            with torch.no_grad(), run.expander.assessing():
                run.model(input_ids=tokens(8, seed=100 + step))
            run.expander.begin_stage()
        yield step, beginning
        run.optimizer.zero_grad()
        loss_of(run.model, step).backward()
        run.optimizer.step()


def rows_now(expander) -> dict:
    """The trained indices along an axis of every weight, and of the bias that goes with it."""
    trained = {}
    for own in expander.training.rows.values():
        name, indices = own.site.name.split("[")[0], own.site.indices(own.units).tolist()
        key = name, own.site.axis
        trained[key] = [*trained.get(key, []), *indices]
        if len(own.parts) == 2:
            bias = name.removesuffix("weight") + "bias", 0
            trained[bias] = [*trained.get(bias, []), *indices]
    return trained


def operators_now(expander) -> list[dict]:
    """The operators with indices of the whole weights."""
    found = factors_now(expander)
    for operator, site in zip(found, expander.sites, strict=False):
        chosen = expander.selections[site.group.name]
        operator["positive"], operator["negative"] = (site.indices(units) for units in chosen)
    return found


MODES = {
    "selected": {"trainable": "selected", "threshold": 0.25},
    "disadvantageous": {"trainable": "disadvantageous", "threshold": 0.25},
    "half": {"trainable": "half", "threshold": 0.25, "trainable_share": 0.88},
    "half at 0": {"trainable": "half", "threshold": 0, "trainable_share": 0.67, "method": "random"},
}


@pytest.mark.numeric
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3"])
def test_training_equals_autograd(mode, model_type):
    with in_float64():
        model, twin = (tiny_model(model_type, torch.float64) for _ in range(2))
        run = make_run(model, **MODES[mode])
        whole = [
            n for n, p in twin.named_parameters() if "embed" in n or "wte" in n or "lm_head" in n
        ]
        oracle = RowOracle(twin, whole if "half" in mode else [], OPTIONS)
        start = copy.deepcopy(model.state_dict())
        for step, beginning in train(run, range(STEPS)):
            if beginning:
                oracle.begin_stage(rows_now(run.expander), operators_now(run.expander))
            oracle.step(
                lambda call, step=step: loss_of(lambda **kw: call(**kw), step), OPTIONS["lr"]
            )
        oracle.begin_stage({}, [])
    expected = twin.state_dict()
    moved = 0
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(
            weight, expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
        moved += int((weight != start[name]).sum())
    assert moved > 0
