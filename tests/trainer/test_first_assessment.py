"""How much data the first assessment reads, and that it leaves model and order as they were."""

import time
import warnings

import pytest
import torch
from composer_run import BATCH_SIZE, Batches, StreamedTokens, run
from helpers import TokenDataset, tiny_llama
from tiny_run import write_shards
from torch import nn
from torch.utils.data import DataLoader

from apex_composer import APEX
from apex_composer.data_prep.progress import progress_bar
from apex_composer.trainer import first_assessment
from apex_composer.trainer.first_assessment import Goal, assess_training_data, first_goal
from apex_composer.trainer.stage_plan import StagePlan

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tokens", "unit", "first_stage", "goal"),
    [
        (30_000_000, "ba", 10_000, ("tok", 30_000_000)),
        (None, "ba", 10_000, ("ba", 100)),
        (None, "tok", 3_000_000_000, ("tok", 30_000_000)),
        (None, "sp", 3, ("sp", 1)),
    ],
)
def test_the_goal_is_the_setting_or_a_hundredth_of_the_first_stage(tokens, unit, first_stage, goal):
    plan = StagePlan(unit, (first_stage, 2 * first_stage), (True, True))
    assert first_goal(tokens, plan) == goal


def loader_of(samples: int = 12, shuffle: bool = False, padded: bool = False) -> DataLoader:
    return DataLoader(TokenDataset(samples, padded=padded), batch_size=4, shuffle=shuffle)


def read(goal: Goal, dataloader, model=None) -> list[dict]:
    """The batches that an assessment reads."""
    seen = []
    assess_training_data(model or nn.Identity(), dataloader, seen.append, goal, CPU)
    return seen


@pytest.mark.parametrize(
    ("goal", "batches"),
    [
        (Goal("ba", 2), 2),
        (Goal("sp", 4), 1),
        (Goal("sp", 5), 2),
        (Goal("tok", 32), 1),
        (Goal("tok", 33), 2),
        (Goal("ba", 3), 3),
    ],
)
def test_no_more_is_read_than_asked_for(goal, batches):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(goal, loader_of())) == batches


def test_padded_tokens_do_not_reach_the_goal():
    """Samples of 8, 7, 6 and 5 tokens: 26 a batch."""
    assert len(read(Goal("tok", 27), loader_of(padded=True))) == 2


def test_data_that_end_too_early_are_warned_about():
    with pytest.warns(UserWarning, match=r"the training data ended after 12 of 100sp"):
        assert len(read(Goal("sp", 100), loader_of())) == 3


def test_the_batches_are_those_that_training_sees_first():
    torch.manual_seed(5)
    loader = loader_of(shuffle=True)
    seen = read(Goal("ba", 2), loader)
    trained = list(loader)
    for own, batch in zip(seen, trained, strict=False):
        assert torch.equal(own["input_ids"], batch["input_ids"])
    torch.manual_seed(5)
    for batch, undisturbed in zip(trained, loader_of(shuffle=True), strict=True):
        assert torch.equal(batch["input_ids"], undisturbed["input_ids"])


class EmptyOnce:
    """A loader resumed at the very end of an epoch: its first pass has nothing left."""

    def __init__(self, batches: list):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter([] if self.passes == 1 else self.batches)


def test_a_run_resumed_at_the_end_of_an_epoch_reads_the_next():
    batches = list(loader_of())
    loader = EmptyOnce(batches)
    assert read(Goal("ba", 2), loader) == batches[:2]
    assert loader.passes == 2


def test_empty_data_are_not_read_for_ever():
    with pytest.warns(UserWarning, match="ended after 0 of 1ba"):
        assert read(Goal("ba", 1), []) == []


class Probing(nn.Module):
    """Records the conditions under which it is called."""

    def __init__(self):
        super().__init__()
        self.trained = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.frozen = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
        self.train()
        self.frozen.eval()
        self.calls = []

    def forward(self, batch):
        modes = {module.training for module in self.modules()}
        self.calls.append((modes, torch.is_grad_enabled()))
        torch.rand(1)


def modes_of(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_forward_passes_run_without_dropout_and_gradients():
    model = Probing()
    before = modes_of(model)
    assert len(set(before)) == 2
    assess_training_data(model, loader_of(), model, Goal("ba", 2), CPU)
    assert model.calls == [({False}, False)] * 2
    assert modes_of(model) == before
    assert torch.is_grad_enabled()


def test_an_error_leaves_modes_and_random_states_as_they_were():
    model, loader = Probing(), loader_of(shuffle=True)
    before, state = modes_of(model), torch.get_rng_state()

    def fail(batch):
        model(batch)
        raise KeyError("x")

    with pytest.raises(KeyError):
        assess_training_data(model, loader, fail, Goal("ba", 2), CPU)
    assert modes_of(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_the_weights_are_left_alone():
    model = tiny_llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = lambda batch: model(**batch)  # noqa: E731
    assess_training_data(model, loader_of(), forward, Goal("tok", 1), CPU)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_bar_leaves_few_states_in_a_log(monkeypatch, capsys):
    at_once = lambda **options: progress_bar(**options | {"delay": 0})  # noqa: E731
    monkeypatch.setattr(first_assessment, "progress_bar", at_once)
    goal, batches = Goal("ba", 200), DataLoader(TokenDataset(200), batch_size=1)
    assess_training_data(nn.Identity(), batches, lambda batch: time.sleep(0.005), goal, CPU)
    assert 1 <= capsys.readouterr().err.count("\r") <= 3


# Sequences of 3, 4 and 1 tokens, and of 2 and 3 before padding, in turns.
ROWS = ([0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 1, 1, 1, -1, -1, -1])


class PackedDataset(TokenDataset):
    """Rows with `sequence_id`, as llm-foundry's packing collator makes them."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        ids = torch.tensor(ROWS[index % 2])
        return {**item, "sequence_id": ids, "attention_mask": (ids >= 0).long()}


def norms_by_hand(dataset, layer: int) -> torch.Tensor:
    """Sum over a batch's sequences of the channels' norms, [channels], in float64."""
    model, found = tiny_llama(dtype=torch.float64), []
    probe = model.model.layers[layer].mlp.down_proj
    probe.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    batch = [dataset[i] for i in range(BATCH_SIZE)]
    ids, mask = (torch.stack([b[k] for b in batch]) for k in ("input_ids", "attention_mask"))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    return sum(
        found[0][row][item["sequence_id"] == sequence].square().sum(0).sqrt()
        for row, item in enumerate(batch)
        for sequence in range(int(item["sequence_id"].max()) + 1)
    )


@pytest.mark.numeric
@pytest.mark.parametrize("microbatch", [BATCH_SIZE, 1])
def test_packed_sequences_count_before_training_and_in_it(microbatch):
    dataset = PackedDataset(24)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE)
    options = {"loader": loader, "max_duration": "1ba", "microbatch": microbatch}
    model = tiny_llama(dtype=torch.float64)
    apex, _, _ = run(APEX(stages=1, expansion=False), model=model, **options)
    sequences = 5 * BATCH_SIZE // 2
    assert apex.history[0]["samples"] == sequences
    state = apex._expander.state_dict()["scores"]
    for layer in range(2):
        _, sums, samples = state[f"model.model.layers.{layer}.mlp.channels"]
        assert samples == sequences
        torch.testing.assert_close(sums, norms_by_hand(dataset, layer), rtol=1e-11, atol=0)


def torch_loader(folder) -> DataLoader:
    torch.manual_seed(5)
    return DataLoader(TokenDataset(16), batch_size=BATCH_SIZE, shuffle=True)


def streaming_loader(folder) -> DataLoader:
    dataset = StreamedTokens(
        local=str(folder), shuffle=True, batch_size=BATCH_SIZE, num_canonical_nodes=1
    )
    return DataLoader(dataset, batch_size=BATCH_SIZE)


@pytest.mark.parametrize("make_loader", [torch_loader, streaming_loader])
def test_training_sees_the_batches_that_it_sees_without_an_assessment(make_loader, tmp_path):
    write_shards(tmp_path / "mds", samples=16)
    orders = []
    for algorithms in ([], [APEX(assessment={"tokens": 100})]):
        batches = Batches()
        loader = make_loader(tmp_path / "mds")
        run(*algorithms, loader=loader, callbacks=(batches,), max_duration="9ba", seed=7)
        orders.append(batches.ids)
    assert orders[0] == orders[1] and len(orders[0]) == 9
    assert orders[0][:4] != orders[0][4:8]  # epochs are shuffled anew
