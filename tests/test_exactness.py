"""The result is that of training W and T by autograd through W_eff."""

import copy

import pytest
import torch
from composer import Callback, Trainer
from composer.algorithms import GradientClipping
from composer.models import HuggingFaceModel
from composer.optim import DecoupledAdamW
from helpers import (
    CHANGE_BOUND,
    SMOOTH_EPS,
    VOCABULARY,
    TokenDataset,
    change_error,
    cross_entropy,
    factors_now,
    tiny_llama,
    tiny_qwen,
    tokens,
)
from oracle import Oracle
from torch.utils.data import DataLoader

from apex_composer import APEX, Expander, StagewiseScheduler, find_sites

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1
BATCHES, BATCH_SIZE, MICROBATCHES = 8, 4, 2


class Recorder(Callback):
    """What the oracle needs to know of a run: losses, learning rates, each stage's start."""

    def __init__(self, apex: APEX):
        self.apex = apex
        self.losses, self.lrs, self.stages = [], [], {}

    def batch_start(self, state, logger):
        batch = state.timestamp.batch.value
        self.lrs.append(state.optimizers[0].param_groups[0]["lr"])
        if self.apex.history[-1]["start_batch"] == batch:
            self.stages[batch] = factors_now(self.apex._expander, prefix="model.")

    def before_train_batch(self, state, logger):
        self.losses.append(0.0)

    def after_loss(self, state, logger):
        self.losses[-1] += state.loss.item() / MICROBATCHES  # Composer's own sum is in float32


class ExactLoss(HuggingFaceModel):
    """A Composer model whose loss stays in the model's dtype."""

    def forward(self, batch):
        return self.model(input_ids=batch["input_ids"])

    def loss(self, outputs, batch):
        return cross_entropy(outputs.logits, batch["labels"])


def eps_of(model: torch.nn.Module) -> float:
    """Adam's: in float32 one that keeps rounding from deciding the direction of a step."""
    return SMOOTH_EPS if next(model.parameters()).dtype == torch.float32 else EPS


def make_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The user's optimizer; decoupled ones take a decay that is not multiplied by lr."""
    options = {"betas": BETAS, "eps": eps_of(model)}
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY, **options)
    if name == "DecoupledAdamW":
        return DecoupledAdamW(model.parameters(), LR, weight_decay=DECAY * LR, **options)
    from llmfoundry.optim import DecoupledLionW

    return DecoupledLionW(model.parameters(), LR, betas=BETAS, weight_decay=DECAY * LR)


def train_with_composer(model, optimizer_name: str, algorithms: list, dataset) -> Recorder:
    """Two stages of four batches, two microbatches each, through the Trainer."""
    apex = next(a for a in algorithms if isinstance(a, APEX))
    recorder = Recorder(apex)
    wrapped = ExactLoss(model, tokenizer=None, use_logits=True)
    trainer = Trainer(
        model=wrapped,
        train_dataloader=DataLoader(dataset, batch_size=BATCH_SIZE),
        optimizers=make_optimizer(optimizer_name, wrapped),
        schedulers=StagewiseScheduler(stages=2, lr_multipliers=[1.0, 0.4]),
        max_duration=f"{BATCHES}ba",
        algorithms=algorithms,
        callbacks=[recorder],
        device_train_microbatch_size=BATCH_SIZE // MICROBATCHES,
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return recorder


def train_with_oracle(model, optimizer_name: str, clip, dataset, recorder: Recorder) -> list:
    """The same run by autograd, given the operators' starting points and learning rates."""
    oracle = Oracle(model, make_optimizer(optimizer_name, model), BETAS, eps_of(model))
    losses = []
    for batch in range(BATCHES):
        if batch in recorder.stages:
            oracle.begin_stage(recorder.stages[batch])
        ids = dataset.ids[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]
        parts = [
            lambda call, part=part: cross_entropy(call(input_ids=part).logits, part)
            for part in ids.chunk(MICROBATCHES)
        ]
        losses.append(oracle.step(parts, recorder.lrs[batch], clip, microbatches=MICROBATCHES))
    oracle.fuse()
    return losses


def compare(model, optimizer_name, clip, clip_first, tolerance, threshold=0.25):
    """Train a model both ways and compare losses and all weights."""
    dataset, twin = TokenDataset(BATCHES * BATCH_SIZE), copy.deepcopy(model)
    # 1.0 is what it is anyway; given, it is not warned about with Lion.
    algorithms = [APEX(stages=2, threshold=threshold, kv_heads="expand", operator_lr_scale=1.0)]
    if clip is not None:
        clipping = GradientClipping("norm", clip)
        algorithms = [clipping, *algorithms] if clip_first else [*algorithms, clipping]
    start = copy.deepcopy(model.state_dict())
    recorder = train_with_composer(model, optimizer_name, algorithms, dataset)
    losses = train_with_oracle(twin, optimizer_name, clip, dataset, recorder)
    assert sorted(recorder.stages) == [0, 4]
    assert recorder.lrs[0] == LR and recorder.lrs[-1] == pytest.approx(0.4 * LR)
    assert recorder.losses == pytest.approx(losses, rel=tolerance, abs=0)
    expected = twin.state_dict()
    for name, weight in model.state_dict().items():
        if weight.dtype == torch.float32:
            assert change_error(weight, expected[name], start[name]) < CHANGE_BOUND, name
        else:
            difference = (weight - expected[name]).abs().max()
            assert difference <= tolerance * expected[name].abs().max(), name
    # The comparison means something only if training moved the weights by far more.
    moved = max((expected[n] - start[n]).abs().max() / start[n].abs().max() for n in start)
    assert moved > 1000 * tolerance


@pytest.mark.parametrize(
    ("optimizer", "clip_first"),
    [
        ("AdamW", None),
        ("AdamW", False),
        ("DecoupledAdamW", True),
        ("DecoupledLionW", None),
        ("DecoupledLionW", True),
    ],
)
def test_composer_run_equals_autograd_in_float64(optimizer, clip_first):
    clip = None if clip_first is None else 0.05
    model = tiny_llama(kv_heads=2, dtype=torch.float64)
    compare(model, optimizer, clip, clip_first, tolerance=1e-10)


@pytest.mark.numeric
def test_composer_run_equals_autograd_in_float32():
    compare(tiny_llama(kv_heads=2), "AdamW", None, None, tolerance=1e-5)


@pytest.mark.numeric
def test_biases_are_expanded_with_their_rows():
    compare(tiny_qwen(dtype=torch.float64), "AdamW", None, None, tolerance=1e-10)


@pytest.mark.numeric
def test_fused_projection_of_mpt_equals_autograd():
    """Three operators share the rows of one Wqkv weight and its bias."""
    from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM

    config = MPTConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=16,
        vocab_size=VOCABULARY,
        ffn_config={"ffn_type": "mptglu", "ffn_hidden_size": 24},
        attn_config={"attn_impl": "torch", "alibi": True, "attn_type": "grouped_query_attention"}
        | {"kv_n_heads": 2},
        norm_type="layernorm",
        no_bias=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = MPTForCausalLM(config).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    twin = copy.deepcopy(model)
    optimizers = [make_optimizer("AdamW", m) for m in (model, twin)]
    expander = Expander(find_sites(model), threshold=0.25, kv_heads="expand")
    with torch.no_grad(), expander.assessing():
        model(input_ids=tokens(8))
    expander.begin_stage()
    expander.attach(optimizers[0])
    oracle = Oracle(twin, optimizers[1], BETAS, EPS)
    oracle.begin_stage(factors_now(expander))
    assert sum("Wqkv" in o.site.name for o in expander.operators) == 6
    for step in range(4):
        ids = tokens(4, seed=step)
        optimizers[0].zero_grad()
        cross_entropy(model(input_ids=ids).logits, ids).backward()
        optimizers[0].step()
        part = lambda call, ids=ids: cross_entropy(call(input_ids=ids).logits, ids)  # noqa: E731
        oracle.step([part], LR, None, microbatches=1)
    oracle.fuse()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, twin.state_dict()[name], rtol=1e-9, atol=1e-11)
