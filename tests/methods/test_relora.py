"""ReLoRA in Composer: when it restarts, at which rates it trains, and how it goes on."""

import pytest
import torch
from composer import Callback
from composer.algorithms import GradientClipping
from composer.callbacks import LRMonitor
from composer.loggers import InMemoryLogger
from composer.optim import LinearWithWarmupScheduler
from composer_run import BATCH_SIZE, StopAt, assert_same_weights
from helpers import TokenDataset, cross_entropy
from llmfoundry.registry import algorithms
from lora_runs import checkpoint, lora_llama, make_lora_trainer, weights
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from apex_composer.methods.lora_restart import find_smallest
from apex_composer.methods.relora import ReLoRA

SETTINGS = {"interval": "3ba", "t_warmup": "2ba", "prune": 0.5}


class Rates(Callback):
    """The rate of every optimizer step."""

    def __init__(self):
        self.used = []

    def fit_start(self, state, logger):
        (optimizer,) = state.optimizers
        optimizer.register_step_pre_hook(
            lambda own, *_: self.used.append(own.param_groups[0]["lr"])
        )


def run(trainer, batch: int | None = None) -> dict:
    """Train, close, and return the weights."""
    if batch is not None:
        trainer.state.callbacks.append(StopAt(batch))
    trainer.fit()
    found = weights(trainer.state.model)
    trainer.close()
    return found


def by_hand() -> dict:
    """Seven steps with restarts after the third and sixth, without Composer and relora.py."""
    model = lora_llama()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, 1e-2, weight_decay=0.1)
    ids = TokenDataset(8 * BATCH_SIZE).ids
    for step in range(7):
        optimizer.param_groups[0]["lr"] = 1e-2 * (0.5 if step in (3, 6) else 1.0)
        optimizer.zero_grad()
        batch = ids[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        cross_entropy(model(batch).logits, batch).backward()
        optimizer.step()
        if step not in (2, 5):
            continue
        model.merge_adapter()  # peft's own
        for module in model.modules():
            if hasattr(module, "merged_adapters"):
                module.merged_adapters.clear()
        new = drawn(step + 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(new[f"model.{name}"])
                elif "lora_B" in name:
                    parameter.zero_()
        for parameter in own:
            smallest = find_smallest(optimizer.state[parameter]["exp_avg"], 0.5)
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][key][smallest] = 0.0
    return {f"model.{name}": weight for name, weight in weights(model).items()}


def drawn(batch: int) -> dict:
    """The A that a run has after its restart at a batch."""
    return run(make_lora_trainer(ReLoRA(**SETTINGS)), batch)


def test_a_run_is_lora_with_restarts_by_hand():
    found, expected = run(make_lora_trainer(ReLoRA(**SETTINGS))), by_hand()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-12)


def test_the_base_moves_at_restarts_only():
    seen = {}

    class Watch(Callback):
        def batch_checkpoint(self, state, logger):
            seen[state.timestamp.batch.value] = weights(state.model)

    run(make_lora_trainer(ReLoRA(**SETTINGS), callbacks=[Watch()]))
    for batch in range(2, 8):
        for name, weight in seen[batch].items():
            moved = not torch.equal(weight, seen[batch - 1][name])
            adapter = "lora_A" in name or "lora_B" in name
            restarted = "base_layer.weight" in name and batch in (3, 6)
            assert moved == (adapter or restarted), (batch, name)


def test_rates_rise_again_after_a_restart_and_are_logged():
    log, rates = InMemoryLogger(), Rates()
    options = {"callbacks": [rates, LRMonitor()], "loggers": [log], "max_duration": "8ba"}
    relora = ReLoRA(interval="4ba", t_warmup="3ba")
    # Falls to 0 over the run; Composer steps schedulers before its clock advances.
    scheduler = LinearWithWarmupScheduler(t_warmup="0ba")
    trainer = make_lora_trainer(relora, schedulers=scheduler, **options)
    trainer.fit()
    usual = [1e-2 * (1 - max(0, step - 1) / 8) for step in range(9)]
    factors = [1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3]
    expected = [rate * factor for rate, factor in zip(usual, factors, strict=True)]
    assert rates.used == pytest.approx(expected[:8])
    logged = [float(value) for _, value in log.data["lr-AdamW/group0"]]
    assert logged == pytest.approx(expected[1:])
    # And left as the scheduler has set it.
    assert trainer.state.optimizers[0].param_groups[0]["lr"] == pytest.approx(usual[8])
    trainer.close()
    restarts = [value for _, value in log.data["relora/restarts"]]
    zeroed = [value for _, value in log.data["relora/zeroed"]]
    assert restarts == [1, 2] and zeroed == pytest.approx([0.9, 0.9], abs=0.01)


def test_who_saves_between_batches_finds_the_rates_of_the_scheduler():
    """`preemption` saves in evaluations, which come before Composer's own checkpoints."""
    seen = {"eval_batch_end": [], "batch_checkpoint": []}

    class Watch(Callback):
        def run_event(self, event, state, logger):
            if event.value in seen:
                rate = state.optimizers[0].param_groups[0]["lr"]
                seen[event.value].append((state.timestamp.batch.value, rate))

    run(
        make_lora_trainer(
            ReLoRA(**SETTINGS),
            callbacks=[Watch()],
            eval_dataloader=DataLoader(TokenDataset(4), batch_size=4),
            eval_interval="1ba",
        )
    )
    for found in seen.values():
        assert found == [(batch, 1e-2) for batch in range(1, 8)]


@pytest.mark.parametrize("every_batch", [True, False])
def test_nothing_adds_up_in_a_scheduler_that_goes_on_from_the_last_rate(every_batch):
    rates = Rates()
    model = lora_llama()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    scheduler = ExponentialLR(optimizer, 0.5)
    trainer = make_lora_trainer(
        ReLoRA(interval="3ba", t_warmup="2ba"),
        model=model,
        optimizers=optimizer,
        schedulers=scheduler,
        step_schedulers_every_batch=every_batch,
        callbacks=[rates],
        max_duration="9ba",  # an epoch has 8
    )
    run(trainer)
    # Without relora, with batches or epochs as its steps.
    usual = [1e-2 * 0.5 ** (step if every_batch else step // 8) for step in range(9)]
    factors = [1, 1, 1, 0.5, 1, 1, 0.5, 1, 1]
    assert rates.used == [rate * factor for rate, factor in zip(usual, factors, strict=True)]


@pytest.mark.parametrize("batch", [3, 4, 5])
def test_a_resumed_run_goes_on_bit_for_bit(batch, tmp_path):
    """At a restart, in the warm-up after it, and later."""

    def make(**options):
        # The global state is another in a new process.
        torch.manual_seed(99)
        model = lora_llama(torch.float32, lora_dropout=0.25)
        given = {"schedulers": LinearWithWarmupScheduler(t_warmup="2ba"), **options}
        clipping = GradientClipping("norm", 0.5)
        return make_lora_trainer(ReLoRA(**SETTINGS), clipping, model=model, **given)

    saving = {"save_folder": str(tmp_path), "save_interval": "1ba"}
    whole = run(make(**saving))
    path = checkpoint(tmp_path, batch)
    assert_same_weights(run(make(load_path=path)), whole)
    state = torch.load(path, weights_only=False)["state"]
    (own,) = [value for name, value in state["algorithms"] if name == "ReLoRA"]
    assert own["settings"] == {"interval": "3ba", "t_warmup": "2ba", "prune": 0.5}
    (groups,) = [value["param_groups"] for value in state["optimizers"].values()]
    usual = 1e-2 * (1 - (batch - 3) / 5)  # the scheduler's, which relora halves at batch 3
    assert [group["lr"] for group in groups] == pytest.approx([usual])


def test_a_run_that_ends_with_a_restart_is_extended_as_if_it_had_been_one(tmp_path):
    first = {"save_folder": str(tmp_path), "save_interval": "6ba", "max_duration": "6ba"}
    run(make_lora_trainer(ReLoRA(**SETTINGS), **first))
    extended = run(make_lora_trainer(ReLoRA(**SETTINGS), load_path=checkpoint(tmp_path, 6)))
    assert_same_weights(extended, run(make_lora_trainer(ReLoRA(**SETTINGS))))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            SETTINGS | {"interval": "0.5dur"},
            "interval: the checkpoint was trained with '3ba', .*4ba",
        ),
        (SETTINGS | {"t_warmup": "1ba"}, "t_warmup: .* '2ba', this run says '1ba'"),
        (SETTINGS | {"prune": 0.9}, "prune: the checkpoint was trained with 0.5"),
    ],
)
def test_a_run_that_goes_on_with_other_settings_is_refused(tmp_path, settings, told):
    """A share of training is another number of batches in a longer run."""
    first = {"save_folder": str(tmp_path), "save_interval": "4ba", "max_duration": "6ba"}
    run(make_lora_trainer(ReLoRA(**SETTINGS | {"interval": "0.5dur"}), **first))
    options = {"load_path": checkpoint(tmp_path, 4), "max_duration": "8ba"}
    trainer = make_lora_trainer(ReLoRA(**settings), **options)
    with pytest.raises(ValueError, match=f"relora: {told}"):
        trainer.fit()
    trainer.close()


def test_a_further_fit_does_not_change_the_interval():
    trainer = make_lora_trainer(ReLoRA(**SETTINGS | {"interval": "0.5dur"}), max_duration="6ba")
    trainer.fit()
    with pytest.raises(ValueError, match="interval: .* '3ba', this run says '4ba'"):
        trainer.fit(duration="2ba")
    trainer.close()


def test_intervals_may_be_epochs_or_shares_of_the_run():
    expected = run(make_lora_trainer(ReLoRA(interval="8ba", t_warmup="3ba"), max_duration="12ba"))
    relora = ReLoRA(interval="1ep", t_warmup="0.25dur")
    assert_same_weights(run(make_lora_trainer(relora, max_duration="12ba")), expected)


def test_seeds_give_other_adapters():
    runs = [run(make_lora_trainer(ReLoRA(**SETTINGS, seed=seed)), 3) for seed in (None, 17, 18)]
    assert_same_weights(runs[0], runs[1])
    for name, weight in runs[2].items():
        assert torch.equal(weight, runs[0][name]) == ("lora_A" not in name)


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"intervall": "3ba"}, TypeError, "Did you mean 'interval'"),
        ({"interval": "0ba"}, ValueError, "relora: interval: got '0ba'"),
        ({"interval": 500}, ValueError, "relora: interval: got 500"),
        ({"t_warmup": "-1ba"}, ValueError, "relora: t_warmup: got '-1ba'"),
        ({"prune": 1.5}, ValueError, "relora: prune: got 1.5"),
        ({"prune": True}, ValueError, "relora: prune: got True"),
        ({"seed": -1}, ValueError, "relora: seed: got -1"),
    ],
)
def test_wrong_settings_are_refused(settings, error, told):
    with pytest.raises(error, match=told):
        algorithms.get("relora")(**settings)  # as a YAML's name finds it
