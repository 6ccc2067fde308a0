"""Forgetting is the difference to the first evaluation, also of a run that was resumed."""

import math
from pathlib import Path

import pytest
from composer import Evaluator, Trainer
from composer.loggers import InMemoryLogger
from composer.metrics import LanguageCrossEntropy
from composer.models import HuggingFaceModel
from helpers import TokenDataset, tiny_llama
from torch.optim import AdamW
from torch.utils.data import DataLoader

from apex_composer.callbacks.forgetting import Forgetting, _mean
from apex_composer.tools.training_yaml import load_configuration

ROOT = Path(__file__).parents[2]


def evaluator(label: str, samples: int, seed: int, **options) -> Evaluator:
    data = TokenDataset(samples, seed=seed, padded=True)
    return Evaluator(label=label, dataloader=DataLoader(data, batch_size=4), **options)


def make(*evaluators: Evaluator, metrics=(LanguageCrossEntropy,), **options) -> Trainer:
    """A trainer over 6 batches that evaluates after every second one."""
    model = tiny_llama()
    wrapped = HuggingFaceModel(model, use_logits=True, eval_metrics=[one() for one in metrics])
    return Trainer(
        model=wrapped,
        train_dataloader=DataLoader(TokenDataset(24, seed=9), batch_size=4),
        eval_dataloader=list(evaluators),
        eval_interval="2ba",
        optimizers=AdamW(wrapped.parameters(), lr=1e-2),
        max_duration="6ba",
        callbacks=[Forgetting()],
        loggers=[InMemoryLogger()],
        device="cpu",
        progress_bar=False,
        **options,
    )


def of_foundry() -> list[Evaluator]:
    """Labelled as llm-foundry labels an eval_loader of several domains."""
    return [evaluator("eval/book", 8, 1), evaluator("eval/cc", 4, 2)]


def logged(trainer: Trainer, name: str) -> list[float]:
    (log,) = (one for one in trainer.logger.destinations if isinstance(one, InMemoryLogger))
    return [float(value) for _, value in log.data.get(name, [])]


def run(*evaluators: Evaluator, first: bool = True, **options) -> Trainer:
    trainer = make(*evaluators, **options)
    if first:
        trainer.eval()  # llm-foundry's eval_first
    trainer.fit()
    trainer.close()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("run")
    return run(*of_foundry(), save_folder=str(folder), save_interval="3ba"), folder


def test_it_is_the_difference_to_the_first_evaluation(whole):
    trainer, _ = whole
    for domain in ("book", "cc"):
        losses = logged(trainer, f"metrics/eval/{domain}/LanguageCrossEntropy")
        assert len(losses) == 4 and len(set(losses)) == 4
        expected = [loss - losses[0] for loss in losses]
        assert logged(trainer, f"forgetting/{domain}") == expected
        assert expected[0] == 0


def test_the_total_weighs_by_predicted_tokens(whole):
    trainer, _ = whole
    # Of 8 tokens 7 are predicted; of every 4 samples 0 + 1 + 2 + 3 are padding.
    tokens = {"book": 2 * (4 * 7 - 6), "cc": 4 * 7 - 6}
    parts = [logged(trainer, f"forgetting/{domain}") for domain in tokens]
    expected = [
        (tokens["book"] * book + tokens["cc"] * cc) / sum(tokens.values())
        for book, cc in zip(*parts, strict=True)
    ]
    assert logged(trainer, "forgetting/total") == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_resumed_run_goes_on_with_the_first_evaluation(whole, caplog):
    trainer, folder = whole
    resumed = run(*of_foundry(), first=False, load_path=str(folder / "ep0-ba3-rank0.pt"))
    for name in ("forgetting/book", "forgetting/cc", "forgetting/total"):
        assert logged(resumed, name) == logged(trainer, name)[-2:]
    assert "forgetting:" not in caplog.text


def test_without_eval_first_the_first_evaluation_in_training_is_the_reference(caplog):
    trainer = run(evaluator("eval", 4, 1), first=False)
    assert "forgetting: eval not evaluated before batch 0" in caplog.text
    losses = logged(trainer, "metrics/eval/LanguageCrossEntropy")
    assert logged(trainer, "forgetting/eval") == [loss - losses[0] for loss in losses]
    assert logged(trainer, "forgetting/total") == []


def test_evaluations_of_other_tokens_are_told(caplog):
    trainer = make(evaluator("eval", 8, 1))
    trainer.eval(subset_num_batches=1)
    trainer.fit()
    trainer.close()
    told = "forgetting: eval has 44 tokens, in the first evaluation it had 22"
    assert caplog.text.count(told) == 3


def test_a_total_is_of_all_domains_or_none():
    """One that is evaluated less often would make it another text's from time to time."""
    rare = evaluator("eval/rare", 4, 3, eval_interval="3ba")
    trainer = run(*of_foundry(), rare)
    assert len(logged(trainer, "forgetting/book")) == 4
    assert len(logged(trainer, "forgetting/rare")) == 3
    assert len(logged(trainer, "forgetting/total")) == 2  # before training, and after batch 6


@pytest.mark.parametrize("label", ["eval/total", "book"])
def test_two_of_one_name_are_refused(label):
    trainer = make(evaluator("eval/book", 4, 1), evaluator(label, 4, 2))
    with pytest.raises(ValueError, match=f"more than one '{label.removeprefix('eval/')}'"):
        trainer.fit()
    trainer.close()


def test_domains_without_tokens_have_no_total():
    assert math.isnan(_mean({"a": [math.nan, 0], "b": [math.nan, 0]}))


def test_a_run_without_losses_is_told(caplog):
    trainer = run(evaluator("eval", 4, 1), metrics=())
    assert "forgetting: no eval_loader has the metric LanguageCrossEntropy" in caplog.text
    assert logged(trainer, "forgetting/eval") == []


@pytest.mark.parametrize("name", ["tinyllama_apex", "instruct/llama2_7b_lora"])
def test_the_shipped_yamls_measure_it_from_the_beginning(name):
    config = load_configuration(ROOT / "yamls" / f"{name}.yaml")
    assert config["callbacks"]["forgetting"] == {} and config["eval_first"] is True
