"""Losses equal the obvious computation and Composer's metric, errors those of resampling."""

import math

import pytest
import torch
from composer import Trainer
from composer.metrics import LanguageCrossEntropy
from composer.models import HuggingFaceModel
from helpers import TokenDataset, tiny_llama, tokens
from torch.utils.data import DataLoader

from apex_composer.evaluate import perplexity
from apex_composer.evaluate.perplexity import (
    IGNORED,
    combine,
    make_batch,
    mean_loss,
    sample_losses,
    token_losses,
)
from apex_composer.evaluate.samples import Sample
from apex_composer.evaluate.texts import Texts


def samples_of_many_lengths(count: int = 7, seed: int = 0) -> list[Sample]:
    ids = tokens(count, 12, seed)
    return [Sample(ids[place, : 12 - place % 5]) for place in range(count)]


def by_hand(model, sample: Sample) -> tuple[float, int]:
    """One sample at a time, one token after the other, in float64."""
    with torch.no_grad():
        scores = model(input_ids=sample.tokens[None]).logits[0].double().log_softmax(-1)
    places = range(1, len(sample.tokens))
    places = [p for p in places if sample.answer is None or p in range(*sample.answer.indices(99))]
    return -sum(scores[p - 1, sample.tokens[p]].item() for p in places), len(places)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_batch_is_the_sum_of_its_samples(batch_size):
    model = tiny_llama(dtype=torch.float64)
    samples = samples_of_many_lengths()
    samples += [sample._replace(answer=slice(3, 6)) for sample in samples]
    samples.append(samples[0]._replace(answer=slice(0, 12)))
    found = sample_losses(model, samples, batch_size=batch_size)
    expected = torch.tensor([by_hand(model, sample) for sample in samples], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert model.training and model.model.training


def test_the_loss_is_that_of_composers_metric():
    model = tiny_llama()
    data = TokenDataset(11, 8, seed=3, padded=True)
    samples = [Sample(row["input_ids"][: row["attention_mask"].sum()]) for row in data]
    wrapped = HuggingFaceModel(model, use_logits=True, eval_metrics=[LanguageCrossEntropy()])
    loader = DataLoader(data, batch_size=4)
    trainer = Trainer(model=wrapped, eval_dataloader=loader, device="cpu", progress_bar=False)
    trainer.eval()
    expected = trainer.state.eval_metrics["eval"]["LanguageCrossEntropy"]
    found = mean_loss(model, Texts({"all": samples}), batch_size=5)
    # float32 rounds to 6e-8; Composer adds 72 losses in it, one batch after the other.
    assert found.total.loss == pytest.approx(expected.compute().item(), rel=1e-6)
    assert found.total.tokens == expected.total_items.item()
    assert found.total == found.domains["all"]
    trainer.close()


def test_answers_are_what_composers_metric_sees_of_them():
    model = HuggingFaceModel(tiny_llama(), tokenizer=None, use_logits=True).eval()
    samples = [s._replace(answer=slice(2, 5)) for s in samples_of_many_lengths()]
    metric, batch = LanguageCrossEntropy(), make_batch(samples)
    with torch.no_grad():
        outputs = model.eval_forward(dict(batch))
    model.update_metric(batch, outputs, metric)
    found = combine({"": sample_losses(model.model, samples)})
    assert found.loss == pytest.approx(metric.compute().item(), rel=1e-6)
    assert found.tokens == 3 * len(samples)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_copied_in_pieces(monkeypatch, dtype):
    logits, targets = torch.randn(3, 10, 50, dtype=dtype), torch.randint(0, 50, (3, 10))
    targets[1, 4:] = IGNORED
    whole = token_losses(logits, targets)
    largest = []
    true_cross_entropy = perplexity.cross_entropy

    def counted(logits, *arguments, **options):
        largest.append((logits.numel(), logits.dtype))
        return true_cross_entropy(logits, *arguments, **options)

    monkeypatch.setattr(perplexity, "cross_entropy", counted)
    monkeypatch.setattr(perplexity, "_LOGITS", 450)
    assert torch.equal(token_losses(logits, targets), whole)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert largest == [(450, wide)] * 3 + [(150, wide)]
    assert whole[:, 1].tolist() == [10, 4, 10]


def test_autocast_is_asked_for_by_its_dtype():
    model, samples = tiny_llama(), samples_of_many_lengths()
    exact = sample_losses(model, samples)
    rough = sample_losses(model, samples, amp=torch.bfloat16)
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=0)


def drawn(generator, count: int, mean: float) -> torch.Tensor:
    """Sums and tokens of samples of many lengths; long ones have lower losses."""
    lengths = torch.randint(5, 200, (count,), generator=generator).double()
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return torch.stack([lengths * (mean - lengths / 400 + 0.3 * noise), lengths], dim=1)


def test_the_error_is_that_of_resampling():
    generator = torch.Generator().manual_seed(0)
    measured = {"a": drawn(generator, 150, 2.0), "b": drawn(generator, 60, 4.0)}
    for given in ({"a": measured["a"]}, measured):
        ratios = []
        for _ in range(2000):
            again = [
                one[torch.randint(0, len(one), (len(one),), generator=generator)]
                for one in given.values()
            ]
            total = torch.cat(again).sum(0)
            ratios.append((total[0] / total[1]).item())
        # The spread of 2000 draws is known to 1 / sqrt(2 x 2000) = 1.6 %.
        assert combine(given).error == pytest.approx(torch.tensor(ratios).std().item(), rel=0.06)


def test_the_error_is_the_formula_by_hand():
    measured = {"a": torch.tensor([[2.0, 1], [3.0, 2], [9.0, 3]], dtype=torch.float64)}
    found = combine(measured)
    ratio = 14 / 6
    squares = sum((s - ratio * n) ** 2 for s, n in [(2, 1), (3, 2), (9, 3)])
    assert found.loss == pytest.approx(ratio, rel=1e-15)
    assert found.error == pytest.approx(math.sqrt(3 / 2 * squares) / 6, rel=1e-12)
    assert (found.tokens, found.sequences) == (6, 3)
    assert found.perplexity == math.exp(found.loss)


def test_the_total_weighs_domains_by_their_tokens():
    model = tiny_llama()
    texts = Texts({"a": samples_of_many_lengths(3), "b": samples_of_many_lengths(5, seed=1)})
    found = mean_loss(model, texts)
    weights = [one.tokens for one in found.domains.values()]
    losses = [one.loss for one in found.domains.values()]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert found.total.loss == pytest.approx(expected, rel=1e-14)
    assert found.total.tokens == sum(weights) and found.total.sequences == 8


def test_one_sample_has_no_error():
    pair = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    assert combine({"a": pair}).error is None
    assert combine({"a": pair, "b": pair.repeat(3, 1)}).error is None


def test_what_cannot_be_measured_is_named():
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="book: there is no token to predict"):
        combine({"book": nothing})
    with pytest.raises(ValueError, match="book: the loss is not finite"):
        combine({"book": torch.tensor([[math.nan, 3.0]], dtype=torch.float64)})
