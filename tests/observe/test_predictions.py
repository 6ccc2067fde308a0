"""Losses against cross entropy sample by sample, exact matches against greedy decoding."""

import math

import pytest
import torch
from observed import FAMILIES, in_full_precision, make_samples, wide_model  # noqa: F401

from apex_composer.evaluate.perplexity import mean_loss
from apex_composer.evaluate.samples import Sample
from apex_composer.evaluate.texts import Texts
from apex_composer.observe.predictions import Predictions, padded_batches, predict

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_each_sample_alone(family, answers):
    model, samples = wide_model(family), make_samples(answers)
    found = predict(model, {"first": samples[:4], "second": samples[4:]}, batch_size=3)
    assert [len(own) for own in found.losses.values()] == [4, 3]
    for sample, (loss, count) in zip(samples, torch.cat([*found.losses.values()]), strict=True):
        with torch.no_grad():
            logits = model(input_ids=sample.tokens.unsqueeze(0)).logits[0].tolist()
        first = sample.answer.start if answers else 1
        expected = [
            math.log(sum(map(math.exp, logits[place - 1])))
            - logits[place - 1][sample.tokens[place]]
            for place in range(max(1, first), len(sample.tokens))
        ]
        assert int(count) == len(expected)
        assert float(loss) == pytest.approx(sum(expected), rel=1e-11)
    assert (found.exact is not None) == answers


def test_means_and_errors_are_those_of_eval():
    model, samples = wide_model("llama"), make_samples()
    texts = Texts({"first": samples[:4], "second": samples[4:]}, {})
    found = predict(model, texts.domains, batch_size=3).mean_loss()
    expected = mean_loss(model, texts).total
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert found.error == pytest.approx(expected.error, rel=1e-9)
    assert (found.tokens, found.sequences) == (expected.tokens, expected.sequences)


def decode(model, prompt: torch.Tensor, length: int) -> list[int]:
    """Greedy decoding, token by token."""
    ids = prompt.tolist()
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_exact_matches_are_those_of_greedy_decoding():
    model = wide_model("llama")
    samples = []
    for sample in make_samples(answers=True):
        prompt = sample.tokens[: sample.answer.start]
        answer = decode(model, prompt, 3)
        for wrong in (None, 0, 2):  # right; wrong at once; wrong in the last token
            given = [(t + 1) % 64 if place == wrong else t for place, t in enumerate(answer)]
            tokens = torch.cat([prompt, torch.tensor(given)])
            samples.append(Sample(tokens, slice(len(prompt), len(tokens))))
    decoded = [decode(model, s.tokens[: s.answer.start], 3) for s in samples]
    expected = [own == s.tokens[s.answer].tolist() for own, s in zip(decoded, samples, strict=True)]
    assert predict(model, {"all": samples}, batch_size=4).exact.tolist() == expected
    assert expected == [True, False, False] * (len(samples) // 3)


def test_a_change_has_the_error_of_pairs():
    whole = torch.tensor([[2.0, 2], [9.0, 3], [5.0, 2]], dtype=torch.float64)
    other = whole + torch.tensor([[2.0, 0], [3.0, 0], [2.0, 0]], dtype=torch.float64)
    found = Predictions({"a": other}, None).mean_change(Predictions({"a": whole}, None))
    assert (found.loss, found.error) == (1.0, 0.0)  # one nat of every token, whatever it was


def test_batches_hold_every_sample_once_the_longest_first():
    samples = make_samples()
    batches = list(padded_batches(samples, 3, torch.device("cpu")))
    assert sorted(place for places, _ in batches for place in places) == list(range(7))
    lengths = [int(row.sum()) for _, batch in batches for row in batch["attention_mask"]]
    assert lengths == sorted(lengths, reverse=True)
    for places, batch in batches:
        rows = zip(places, batch["input_ids"], batch["attention_mask"], strict=True)
        for place, row, own in rows:
            assert row[own == 1].tolist() == samples[place].tokens.tolist()
