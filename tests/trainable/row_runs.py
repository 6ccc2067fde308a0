"""Plain loops that train some rows, and the oracle beside them."""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

import torch
from helpers import cross_entropy, tokens
from row_oracle import RowOracle
from running_rows import operators_now, rows_now
from torch.optim import AdamW

from apex_composer import Expander, find_sites

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS, STAGE = 6, 2


def make_run(model, attach: bool = True, options: Mapping = OPTIONS, **settings) -> SimpleNamespace:
    optimizer = AdamW(model.parameters(), **options)
    expander = Expander(find_sites(model), kv_heads="expand", **settings)
    if attach:
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


MODES = {
    "selected": {"trainable": "selected", "threshold": 0.25},
    "disadvantageous": {"trainable": "disadvantageous", "threshold": 0.25},
    "half": {"trainable": "half", "threshold": 0.25, "trainable_share": 0.88},
    "half at 0": {"trainable": "half", "threshold": 0, "trainable_share": 0.67, "method": "random"},
}


def compare(run, twin: torch.nn.Module, options: Mapping = OPTIONS) -> RowOracle:
    """Train, and have the oracle train the twin."""
    whole = {id(p) for p in run.expander.training._whole}
    whole = [name for name, p in run.model.named_parameters() if id(p) in whole]
    oracle = RowOracle(twin, whole, options)
    for step, beginning in train(run, range(STEPS)):
        if beginning:
            oracle.begin_stage(rows_now(run.expander), operators_now(run.expander))
        oracle.step(partial(loss_of, step=step))
    oracle.write()
    return oracle
