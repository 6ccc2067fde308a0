"""EMA: who sees the average, what training goes on with, and what cannot be averaged."""

import pytest
import torch
from composer import Callback
from composer.algorithms import EMA as ComposersEMA
from composer.utils import FSDP2Config, FSDPConfig
from composer_run import BATCH_SIZE, assert_same_weights, make_trainer, run
from helpers import TokenDataset, tiny_llama
from llmfoundry.utils.builders import build_algorithm
from lora_runs import make_lora_trainer
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from apex_composer import APEX
from apex_composer.methods.ema import EMA
from apex_composer.methods.relora import ReLoRA
from apex_composer.methods.s2ft import S2FT

SETTINGS = {"half_life": "2ba"}
SMOOTHING = 2**-0.5


def weights_of(state) -> dict:
    model = getattr(state.model, "module", state.model).model
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Watch(Callback):
    """The weights of training behind every batch, and those that evaluations see."""

    def __init__(self):
        self.trained, self.evaluated, self.began = [], [], []

    def batch_start(self, state, logger):
        self.began.append(weights_of(state))

    def batch_end(self, state, logger):
        self.trained.append(weights_of(state))

    def eval_batch_start(self, state, logger):
        self.evaluated.append(weights_of(state))


def evaluating(*algorithms, **options) -> Watch:
    watch = Watch()
    data = DataLoader(TokenDataset(BATCH_SIZE), batch_size=BATCH_SIZE)
    evaluation = {"eval_dataloader": data, "eval_interval": "1ba"}
    run(*algorithms, callbacks=(watch,), **evaluation, **options)
    return watch


def expected_averages(trained: list[dict]) -> list[dict]:
    """Slow and obvious; the average begins as the weights behind the first batch."""
    averages: list[dict] = []
    for weights in trained:
        last = averages[-1] if averages else weights
        averages.append({n: last[n] * SMOOTHING + w * (1 - SMOOTHING) for n, w in weights.items()})
    return averages


def apex() -> APEX:
    return APEX(threshold=0.25, stages=["3ba", "3ba"])


@pytest.mark.parametrize("beside", ["alone", "before apex", "behind apex"])
def test_evaluations_see_the_average_and_training_its_own_weights(beside, tmp_path):
    """With and without apex, in both orders, whose operators are part of both; with checkpoints."""
    others = [] if beside == "alone" else [apex()]
    both = [*others, EMA(**SETTINGS)]
    saved = {"save_folder": str(tmp_path), "save_interval": "2ba"}
    watch = evaluating(*(both if beside == "behind apex" else both[::-1]), **saved)
    plain = Watch()
    run(*([] if beside == "alone" else [apex()]), callbacks=(plain,))
    for found, weights in zip(watch.trained, plain.trained, strict=True):
        assert_same_weights(found, weights)
    for found, weights in zip(watch.began, plain.began, strict=True):
        assert_same_weights(found, weights)
    for found, weights in zip(watch.evaluated, expected_averages(plain.trained), strict=True):
        assert_same_weights(found, weights)


@pytest.mark.parametrize("with_apex", [False, True])
def test_a_resumed_run_goes_on_with_the_same_bits(with_apex, tmp_path):
    """In the middle of a stage and at its end; the checkpoint's model is the average."""

    def algorithms() -> list:
        return [*([apex()] if with_apex else []), EMA(**SETTINGS)]

    saved = {"save_folder": str(tmp_path), "save_interval": "1ba"}
    whole = evaluating(*algorithms(), **saved)
    for batch in (2, 3):
        path = str(tmp_path / f"ep0-ba{batch}-rank0.pt")
        content = torch.load(path, weights_only=False)["state"]
        average = {name.removeprefix("model."): w for name, w in content["model"].items()}
        for name, weight in whole.evaluated[batch - 1].items():
            assert torch.equal(average[name], weight), name
        resumed = evaluating(*algorithms(), model=tiny_llama(seed=1), load_path=path)
        for kind in ("trained", "evaluated"):
            pairs = zip(getattr(resumed, kind), getattr(whole, kind)[batch:], strict=True)
            for found, weights in pairs:
                assert_same_weights(found, weights)


@pytest.mark.parametrize("order", [1, -1], ids=["before ema", "behind ema"])
@pytest.mark.parametrize("how", ["a branch", "the clock set back"])
def test_a_stage_that_begins_anew_is_assessed_on_the_weights_that_train(how, order, tmp_path):
    """Behind a saved batch the model holds the average, of the checkpoint as of the trainer."""

    def watched(model) -> list:
        seen = []

        def keep(module, *_: object) -> None:
            if not module.training:
                seen.append(module.lm_head.weight.detach().clone())

        model.register_forward_pre_hook(keep)
        return seen

    path = tmp_path / "ep0-ba2-rank0.pt"
    saved = {"save_folder": str(tmp_path), "save_interval": "2ba", "save_overwrite": True}
    options = {"max_duration": "2ba", "lr": 3e-2}
    model = tiny_llama()
    trainer = make_trainer(
        APEX(stages=1, threshold=0.25), EMA(**SETTINGS), model=model, **options, **saved
    )
    trainer.fit()
    held = dict(torch.load(path, weights_only=False)["state"]["algorithms"])["EMA"]["ema_model"]
    trained = next(w for n, w in held["named_parameters_dict"].items() if "lm_head" in n)
    assert not torch.equal(trained, model.lm_head.weight)
    if how == "a branch":
        trainer.close()
        point = {"parent": str(path), "sha256": "0", "batch": 2, "stage": 0, "changed": {}}
        again = APEX(stages=1, threshold=0.5, branch=point)
        both, model = [again, EMA(**SETTINGS)][::order], tiny_llama(seed=1)
        seen = watched(model)
        options["max_duration"] = "4ba"
        trainer = make_trainer(*both, model=model, load_path=str(path), **options)
        trainer.fit()
    else:
        trainer.state.algorithms = trainer.state.algorithms[::order]
        seen = watched(model)
        with pytest.warns(UserWarning, match="begins anew"):
            trainer.fit(reset_time=True, duration="2ba")
    trainer.close()
    assert seen and all(torch.equal(own, trained) for own in seen)


def test_an_average_by_epochs_is_of_the_weights_where_a_checkpoint_is_saved(tmp_path):
    """Composer's own takes the average for the weights then, and trains on with a mixture."""
    epochs = {
        "loader": DataLoader(TokenDataset(2 * BATCH_SIZE), batch_size=BATCH_SIZE),
        "max_duration": "3ep",
    }
    saved = {"save_folder": str(tmp_path), "save_interval": "1ba"}
    watch, plain, composers = Watch(), Watch(), Watch()
    run(EMA(half_life="1ep"), callbacks=(watch,), **epochs, **saved)
    run(callbacks=(plain,), **epochs)
    for found, weights in zip(watch.trained, plain.trained, strict=True):
        assert_same_weights(found, weights)
    saved["save_folder"] += "/composers"
    run(ComposersEMA(half_life="1ep"), callbacks=(composers,), **epochs, **saved)
    name = "lm_head.weight"
    assert not torch.equal(composers.trained[-1][name], plain.trained[-1][name])


def test_another_trainer_begins_its_own_average(tmp_path):
    algorithm, data = EMA(**SETTINGS), {"save_folder": str(tmp_path)}
    first = evaluating(algorithm, max_duration="2ba", **data)
    second = evaluating(algorithm, max_duration="2ba")
    for found, weights in zip(second.evaluated, first.evaluated, strict=True):
        assert_same_weights(found, weights)


def test_an_exported_model_is_the_average():
    """Without any checkpoint of Composer's."""
    seen = {}

    class HuggingFaceCheckpointer(Callback):
        def check_interval(self, state, event):
            return event.value == "batch_checkpoint" and state.timestamp.batch.value == 3

        def batch_checkpoint(self, state, logger):
            seen[state.timestamp.batch.value] = weights_of(state)

    watch = Watch()
    run(EMA(**SETTINGS), callbacks=(watch, HuggingFaceCheckpointer()))
    assert_same_weights(seen[3], expected_averages(watch.trained)[2])
    assert_same_weights(seen[4], watch.trained[3])


def test_constants_in_buffers_stay_as_they_are():
    """0.01 and 0.99 of a whole number, added, are a little less, which integers cut off."""

    class Buffers(Callback):
        def eval_batch_start(self, state, logger):
            seen.append(state.model.model.positions.clone())

    seen, model = [], tiny_llama()
    model.register_buffer("positions", torch.arange(64))
    data = DataLoader(TokenDataset(BATCH_SIZE), batch_size=BATCH_SIZE)
    evaluation = {"eval_dataloader": data, "eval_interval": "2ba"}
    run(EMA(half_life="100ba"), model=model, callbacks=(Buffers(),), **evaluation)
    assert len(seen) == 3 and all(torch.equal(own, torch.arange(64)) for own in seen)


def test_a_checkpoint_of_ddp_goes_on_in_one_process(tmp_path):
    """There, names have a prefix."""
    saved = {"save_folder": str(tmp_path), "save_interval": "2ba"}
    whole = evaluating(EMA(**SETTINGS), **saved)
    path = tmp_path / "ep0-ba4-rank0.pt"
    content = torch.load(path, weights_only=False)
    own = dict(content["state"]["algorithms"])["EMA"]["ema_model"]
    own["named_parameters_dict"] = {
        f"module.{name}": weight for name, weight in own["named_parameters_dict"].items()
    }
    torch.save(content, path)
    resumed = evaluating(EMA(**SETTINGS), model=tiny_llama(seed=1), load_path=str(path))
    for found, weights in zip(resumed.evaluated, whole.evaluated[4:], strict=True):
        assert_same_weights(found, weights)


def test_adapters_are_averaged_and_frozen_weights_take_no_memory():
    algorithm = EMA(**SETTINGS)
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", r=2))
    watch = evaluating(algorithm, model=model)
    held = algorithm.ema_model.named_parameters_dict
    assert held and all("lora_" in name for name in held)
    averages = expected_averages(watch.trained)
    for name in (name for name in watch.trained[0] if "lora_" in name):
        assert torch.equal(watch.evaluated[-1][name], averages[-1][name]), name


def test_llm_foundry_knows_it_by_name_and_smoothing_alone_is_enough():
    found = build_algorithm("ema", {"half_life": None, "smoothing": 0.9})
    assert isinstance(found, EMA) and found.smoothing == 0.9 and found.update_interval.value == 1


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"half_live": "1ba"}, TypeError, "unknown key 'half_live'. Did you mean 'half_life'"),
        ({"half_life": 100}, ValueError, "half_life: got 100, allowed: a positive Composer time"),
        ({"half_life": "-1ba"}, ValueError, "half_life: got '-1ba', allowed: a positive"),
        ({"half_life": "0ba"}, ValueError, "half_life: got '0ba', allowed: a positive"),
        ({"half_life": "9tok"}, ValueError, "half_life: got '9tok', .* time string in ba, ep,"),
        ({"update_interval": "0ba"}, ValueError, "update_interval: got '0ba', allowed: a positive"),
        ({"update_interval": "1ep"}, ValueError, "update_interval: got '1ep', .* string in ba,"),
        ({"ema_start": 0}, ValueError, "ema_start: got 0, allowed: a Composer time string in ba"),
        ({"smoothing": 0.9}, ValueError, "smoothing: got 0.9 with half_life: '1000ba', allowed: o"),
        ({"half_life": None}, ValueError, "smoothing: got None with half_life: None, allowed: one"),
        ({"half_life": None, "smoothing": 2}, ValueError, "smoothing: got 2, allowed: a number in"),
        ({"half_life": None, "smoothing": "0.9"}, ValueError, "smoothing: got '0.9', allowed: a n"),
    ],
)
def test_settings_are_checked_at_construction(given, error, told):
    """Composer's own takes half of these: an average that runs away, or none."""
    with pytest.raises(error, match=f"^ema: {told}"):
        EMA(**given)


@pytest.mark.parametrize("kind", [EMA, ComposersEMA])
@pytest.mark.parametrize("make", [APEX, S2FT])
def test_rows_are_not_averaged(kind, make):
    rows = make(trainable_share=0.35, **({"trainable": "selected"} if make is APEX else {}))
    with pytest.raises(ValueError, match="^algorithms: got ema, allowed with apex: trainable: all"):
        make_trainer(rows, kind(**SETTINGS))


def test_what_cannot_be_averaged_is_refused_when_the_run_is_built():
    with pytest.raises(ValueError, match="algorithms: got 2 of the kind of ema, allowed: one"):
        make_trainer(EMA(**SETTINGS), EMA(**SETTINGS))
    for order in (1, -1):
        both = [EMA(**SETTINGS), ReLoRA(interval="2ba", t_warmup="0ba")][::order]
        with pytest.raises(ValueError, match="algorithms: got EMA with relora, allowed: one of"):
            make_lora_trainer(*both)
    with pytest.raises(ValueError, match="model.* is trained in torch.bfloat16, allowed: float32"):
        make_trainer(EMA(**SETTINGS), model=tiny_llama(dtype=torch.bfloat16))
    for config in (FSDPConfig(), FSDP2Config()):
        trainer = make_trainer(EMA(**SETTINGS))
        trainer.state.fsdp_config = config
        with pytest.raises(ValueError, match="got ema with fsdp_config, allowed: one process"):
            trainer.engine.run_event("init")
