"""The penalty's gradient is autograd's, whatever the batch looks like, and nothing else changes."""

import copy

import pytest
import torch
from by_hand import norm_deviations
from composer import Callback, DataSpec
from composer.algorithms import GradientClipping
from composer_run import assert_same_weights, make_trainer, run
from helpers import TokenDataset, tiny_llama, tokens
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from apex_composer import APEX, find_sites
from apex_composer.methods.act_regu import ActRegu, _Hook

COEFFICIENT = 0.3
PACKED = torch.tensor([[0] * 3 + [1] * 5, [0] * 8, [0, 1, 1, 1, 2, 2, -1, -1], [0] * 6 + [-1] * 2])


class Tokens(TokenDataset):
    """With padding, with packed rows of several sequences, or plain."""

    def __init__(self, kind: str):
        super().__init__(4, padded=kind == "padded")
        self.kind = kind

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if self.kind == "packed":
            item |= {"sequence_id": PACKED[index], "attention_mask": (PACKED[index] >= 0).long()}
        return item


def samples_of(kind: str) -> torch.Tensor:
    if kind == "packed":
        return PACKED
    return torch.stack([item["attention_mask"] for item in Tokens(kind)]) - 1


def penalty(model, ids: torch.Tensor) -> torch.Tensor:
    """The mean over samples and groups, by plain hooks and autograd."""
    seen, groups = {}, {s.group.name: s.group.assessed_by or s.group for s in find_sites(model)}
    groups = {group.name: group for group in groups.values()}
    handles = [
        group.probe.register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: inputs[0]})
        )
        for name, group in groups.items()
    ]
    model(input_ids=tokens(4))
    for handle in handles:
        handle.remove()
    found = [norm_deviations(seen[name], group.unit_size, ids) for name, group in groups.items()]
    return torch.stack([torch.stack(own).mean() for own in found]).mean()


class Seen(Callback):
    """Gradients of the first batch, and the losses that training sees."""

    def __init__(self):
        self.gradients, self.losses = {}, []

    def after_loss(self, state, logger):
        self.losses.append(state.loss.item())

    def after_train_batch(self, state, logger):
        own = {name: p.grad for name, p in state.model.model.named_parameters()}
        self.gradients = {n: g.clone() for n, g in own.items() if g is not None}


def first_batch(*algorithms, kind="rows", checkpointing=None, **options):
    """One batch of a Llama with grouped heads in float64."""
    from composer.loggers import InMemoryLogger

    model = tiny_llama(kv_heads=2, dtype=torch.float64)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    loader = DataLoader(Tokens(kind), batch_size=4)
    if options.pop("by_tokens", False):
        count = lambda batch, token_type="total": int((batch["labels"] != -100).sum())  # noqa: E731
        loader = DataSpec(loader, get_num_tokens_in_batch=count)
        options["accumulate_train_batch_on_tokens"] = True
    seen, log = Seen(), InMemoryLogger()
    trainer = make_trainer(
        *algorithms,
        model=model,
        loader=loader,
        callbacks=(seen,),
        loggers=[log],
        max_duration="1ba",
        **options,
    )
    trainer.fit()
    trainer.close()
    assert not any(module._forward_pre_hooks for module in model.modules())
    return seen, log


CASES = {
    "rows": {},
    "microbatches": {"microbatch": 2},
    "uneven": {"microbatch": 3, "kind": "padded"},
    "by tokens": {"microbatch": 1, "kind": "padded", "by_tokens": True},
    "packed": {"microbatch": 1, "kind": "packed"},
    "packed by tokens": {"microbatch": 3, "kind": "packed", "by_tokens": True},
    "checkpointing": {"microbatch": 2, "kind": "packed", "checkpointing": "not"},
    "reentrant": {"microbatch": 2, "kind": "padded", "checkpointing": "reentrant"},
}


@pytest.mark.parametrize("beside", [(), (APEX,)], ids=["alone", "apex"])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_has_the_gradient_of_the_loss_and_the_mean_penalty(case, beside):
    """By what it adds to a batch without it; the losses stay what they are, to the bit."""
    others = [kind(threshold=0.25, stages=1) for kind in beside]
    plain, plain_log = first_batch(*others, **CASES[case])
    others = [kind(threshold=0.25, stages=1) for kind in beside]
    found, log = first_batch(ActRegu(coefficient=COEFFICIENT), *others, **CASES[case])
    model = tiny_llama(kv_heads=2, dtype=torch.float64)
    wanted = penalty(model, samples_of(CASES[case].get("kind", "rows")))
    (COEFFICIENT * wanted).backward()
    assert found.losses == plain.losses
    assert log.data["loss/train/total"] == plain_log.data["loss/train/total"]
    assert [v for _, v in log.data["act_regu/penalty"]] == [pytest.approx(wanted.item(), rel=1e-12)]
    for name, parameter in model.named_parameters():
        added = found.gradients[name] - plain.gradients[name]
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(added, expected, rtol=1e-8, atol=1e-14)
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 1e-5


def test_rows_that_are_trained_have_it_too():
    """Beside apex with `trainable: selected`, in the gradients of the copied rows."""

    class Rows(Callback):
        def after_train_batch(self, state, logger):
            rows = algorithms[0]._expander.training.rows
            own = {name: (row, row.parts[0].copy.grad.clone()) for name, row in rows.items()}
            found.append(own)

    found = []
    for more in ([], [ActRegu(coefficient=COEFFICIENT)]):
        model = tiny_llama(kv_heads=2, dtype=torch.float64)
        algorithms = [APEX(threshold=0.25, stages=1, trainable="selected"), *more]
        loader = DataLoader(Tokens("rows"), batch_size=4)
        run(*algorithms, model=model, loader=loader, callbacks=(Rows(),), max_duration="1ba")
    model = tiny_llama(kv_heads=2, dtype=torch.float64)
    (COEFFICIENT * penalty(model, samples_of("rows"))).backward()
    reached = 0
    for name, (row, gradient) in found[1].items():
        whole = model.get_parameter(name.removeprefix("model.")).grad
        if whole is not None:
            wanted = whole.index_select(row.site.axis, row.site.indices(row.units))
            added = (gradient - found[0][name][1]).double()
            added = added if added.shape == wanted.shape else added.T
            torch.testing.assert_close(added, wanted, rtol=1e-3, atol=1e-7)
            reached += float(wanted.abs().max()) > 1e-4
    assert reached >= 6


def test_adapters_have_it_too():
    """Of LoRA on all linear layers, which holds the projections inside of its own."""
    ends = []
    for algorithms in ([], [ActRegu(coefficient=1.0)]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(tiny_llama(), config)
        start = copy.deepcopy(model.state_dict())
        ends.append(run(*algorithms, model=model, max_duration="2ba")[1])
    moved = [name for name, weight in start.items() if not torch.equal(weight, ends[1][name])]
    assert moved and all("lora_" in name for name in moved)
    assert not all(torch.equal(ends[0][name], ends[1][name]) for name in moved)


def test_evaluation_is_not_changed():
    """Neither what it computes, by evaluating in a run, nor the training around it."""

    class Outputs(Callback):
        def eval_after_forward(self, state, logger):
            seen.append(state.outputs.clone())

    seen, data = [], DataLoader(TokenDataset(8, seed=1), batch_size=4)
    options = {"max_duration": "3ba", "eval_interval": "1ba", "callbacks": (Outputs(),)}
    _, weights, log = run(ActRegu(), eval_dataloader=data, **options)
    assert_same_weights(weights, run(ActRegu(), max_duration="3ba")[1])
    assert len(log.data["act_regu/penalty"]) == 3 and len(seen) == 6
    model = tiny_llama()
    model.load_state_dict(weights)
    with torch.no_grad():
        for batch, logits in zip(data, seen[-2:], strict=True):
            assert torch.equal(model(**batch).logits, logits)


def test_training_lowers_the_deviation():
    ends = {}
    for coefficient in (None, 1.0):
        algorithms = [] if coefficient is None else [ActRegu(coefficient=coefficient)]
        model = tiny_llama(dtype=torch.float64)
        run(*algorithms, model=model, max_duration="8ba")
        with torch.no_grad():
            ends[coefficient] = penalty(model, samples_of("rows"))
    assert ends[1.0] < 0.5 * ends[None]


def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path):
    options = {"microbatch": 2, "max_duration": "4ba"}
    saved = {"save_folder": str(tmp_path), "save_interval": "2ba"}
    _, weights, _ = run(ActRegu(), GradientClipping("norm", 0.5), **options, **saved)
    load = {"load_path": str(tmp_path / "ep0-ba2-rank0.pt"), **options}
    clipping = GradientClipping("norm", 0.5)
    _, found, _ = run(clipping, ActRegu(), model=tiny_llama(seed=1), **load)
    assert_same_weights(found, weights)
    assert weights.keys() == tiny_llama().state_dict().keys()
    with pytest.raises(ValueError, match="act_regu: coefficient: the checkpoint was trained with"):
        make_trainer(ActRegu(coefficient=0.5), **load)


def test_a_batch_that_failed_leaves_nothing_for_the_next_run():
    """Its hooks are replaced, or gone where the trainer is closed, and penalise nothing more."""

    class Fails(Callback):
        def after_forward(self, state, logger):
            raise RuntimeError("no luck")

    model = tiny_llama()
    start = copy.deepcopy(model.state_dict())
    trainer = make_trainer(ActRegu(), model=model, callbacks=(Fails(),))
    with pytest.raises(RuntimeError, match="no luck"):
        trainer.fit()
    assert any(isinstance(h, _Hook) for m in model.modules() for h in m._forward_pre_hooks.values())
    model.load_state_dict(start)
    second = make_trainer(ActRegu(), model=model, max_duration="2ba")
    second.fit(duration="1ba")
    trainer.close()  # takes its own hooks only
    second.fit(duration="1ba")
    expected = run(ActRegu(), max_duration="2ba")[1]
    assert_same_weights(model.state_dict(), expected)
    trainer = make_trainer(ActRegu(), model=model, callbacks=(Fails(),))
    with pytest.raises(RuntimeError, match="no luck"):
        trainer.fit()
    trainer.close()
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.load_state_dict(start)
    assert_same_weights(run(model=model, max_duration="2ba")[1], run(max_duration="2ba")[1])


def test_layers_that_do_not_call_the_hooks_are_no_secret():
    """As code that torch.compile has kept of a run without them."""

    class Drops(Callback):
        def fit_start(self, state, logger):
            state.model.model.model.layers[1].mlp.down_proj._forward_pre_hooks.clear()

    trainer = make_trainer(ActRegu(), callbacks=(Drops(),), microbatch=2)
    with pytest.raises(RuntimeError, match="act_regu: penalised were 6 activations .* needed: 8"):
        trainer.fit()
    trainer.close()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="act_regu: coefficient: got 0, allowed: a positive float"):
        ActRegu(coefficient=0)
    with pytest.raises(ValueError, match="no sites to expand"):
        make_trainer(ActRegu(), model=_NoLlama())
    trainer = make_trainer(ActRegu(), loader=DataLoader(tokens(8), batch_size=4))
    with pytest.raises(ValueError, match="train_loader: got batches of type Tensor without"):
        trainer.fit()
    trainer.close()


class _NoLlama(type(tiny_llama())):
    def __init__(self):
        super().__init__(tiny_llama().config)
        self.config.model_type = "other"
