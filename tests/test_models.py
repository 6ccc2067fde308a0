"""Every architecture through stages of a plain loop: exact, resumable, and exported as it was."""

import copy
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from helpers import cross_entropy, factors_now, tokens
from oracle import Oracle
from tiny_models import CONFIGURATIONS, in_float64, tiny_model
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from apex_composer import Expander, find_sites

LR, BETAS, EPS = 1e-2, (0.9, 0.95), 1e-8
STEPS, STAGE = 4, 2  # optimizer steps in all, and of each stage


def make_run(model: torch.nn.Module) -> SimpleNamespace:
    optimizer = AdamW(model.parameters(), LR, betas=BETAS, eps=EPS, weight_decay=0.1)
    expander = Expander(find_sites(model), threshold=0.25, kv_heads="expand")
    expander.attach(optimizer)
    return SimpleNamespace(model=model, optimizer=optimizer, expander=expander)


def train(run: SimpleNamespace, steps: range) -> Iterator[list[dict] | None]:
    """Take the steps; before each, tell the operators of a stage that begins there."""
    for step in steps:
        beginning = step % STAGE == 0
        if beginning:
            with torch.no_grad(), run.expander.assessing():
                run.model(input_ids=tokens(8, seed=100 + step))
            run.expander.begin_stage()
        yield factors_now(run.expander) if beginning else None
        run.optimizer.zero_grad()
        ids = tokens(4, seed=step)
        cross_entropy(run.model(input_ids=ids).logits, ids).backward()
        run.optimizer.step()


@cache
def trained(model_type: str) -> SimpleNamespace:
    """A run to its end, and what autograd and a run resumed in the second stage made of it."""
    with in_float64():
        model, start, twin = (tiny_model(model_type, torch.float64) for _ in range(3))
        run = make_run(model)
        optimizer = AdamW(twin.parameters(), LR, betas=BETAS, eps=EPS, weight_decay=0.1)
        oracle = Oracle(twin, optimizer, BETAS, EPS)
        for step, stage in enumerate(train(run, range(STEPS))):
            if stage is not None:
                oracle.begin_stage(stage)
            if step == STEPS - 1:
                saved = {name: copy.deepcopy(p.state_dict()) for name, p in vars(run).items()}
            ids = tokens(4, seed=step)
            part = lambda call, ids=ids: cross_entropy(call(input_ids=ids).logits, ids)  # noqa: E731
            oracle.step([part], LR, None, microbatches=1)
        oracle.fuse()
        resumed = make_run(tiny_model(model_type, torch.float64, seed=1))
        for name, state in saved.items():
            getattr(resumed, name).load_state_dict(state)
        list(train(resumed, range(STEPS - 1, STEPS)))
    run.expander.fuse()
    run.start, run.oracle, run.resumed = start, twin, resumed
    return run


@pytest.mark.numeric
@pytest.mark.parametrize("model_type", CONFIGURATIONS)
def test_training_equals_autograd(model_type):
    run = trained(model_type)
    expected, start = run.oracle.state_dict(), run.start.state_dict()
    names = {site.name.split("[")[0] for site in run.expander.sites}
    for name, weight in run.model.state_dict().items():
        difference = (weight - expected[name]).abs().max()
        assert difference <= 1e-10 * expected[name].abs().max(), name
        if name in names:  # means something only if training moved the weights by far more
            assert (weight - start[name]).abs().max() > 1e-4 * start[name].abs().max()


@pytest.mark.parametrize("model_type", CONFIGURATIONS)
def test_a_resumed_run_goes_on_with_the_same_bits(model_type):
    run = trained(model_type)
    expected = run.model.state_dict()
    for name, weight in run.resumed.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("model_type", CONFIGURATIONS)
def test_what_is_exported_is_an_ordinary_model(model_type, tmp_path):
    run = trained(model_type)
    assert [*run.model.state_dict()] == [*run.start.state_dict()]
    run.model.save_pretrained(tmp_path)
    options = {"attn_implementation": run.model.config._attn_implementation}
    with in_float64(), torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options).double().eval()
        expected, found = (model(input_ids=tokens(2)).logits for model in (run.model, loaded))
    assert type(loaded) is type(run.model)
    assert torch.equal(found, expected)
