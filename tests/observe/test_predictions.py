"""Losses against cross entropy sample by sample, exact matches against greedy decoding."""

import math
import statistics

import pytest
import torch
from observed import FAMILIES, in_full_precision, make_samples, wide_model  # noqa: F401

from apex_composer.evaluate.samples import Sample
from apex_composer.observe.predictions import mean_per_token, padded_batches, predict

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_each_sample_alone(family, answers):
    model, samples = wide_model(family), make_samples(answers)
    found = predict(model, samples, batch_size=3)
    for sample, loss, count in zip(samples, found.losses, found.tokens, strict=True):
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
    assert predict(model, samples, batch_size=4).exact.tolist() == expected
    assert expected == [True, False, False] * (len(samples) // 3)


def test_a_mean_over_tokens_and_its_error():
    # Of equal lengths it is the mean of means, and the error that of a mean.
    means = [1.0, 2.0, 4.0, 5.0]
    sums, tokens = torch.tensor(means).double() * 7, torch.full((4,), 7)
    mean, error = mean_per_token(sums, tokens)
    assert mean == 3.0
    assert error == pytest.approx(statistics.stdev(means) / 2)
    # The spread of many draws of samples of several lengths is what the error says.
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (4000, 50), generator=generator)
    losses = lengths * (2 + torch.randn(4000, 50, generator=generator, dtype=torch.float64))
    found = [mean_per_token(s, n) for s, n in zip(losses, lengths, strict=True)]
    spread = statistics.stdev(mean for mean, _ in found)
    assert statistics.fmean(error for _, error in found) == pytest.approx(spread, rel=0.05)
    assert mean_per_token(torch.tensor([6.0]), torch.tensor([3])) == (2.0, None)


def test_a_sample_of_one_token_has_nothing_to_predict():
    model, samples = wide_model("llama"), make_samples()
    alone = Sample(samples[0].tokens[:1])
    found = predict(model, [*samples, alone])
    assert found.tokens[-1] == 0 and found.losses[-1] == 0
    assert found.mean_loss()[0] == pytest.approx(predict(model, samples).mean_loss()[0])


def test_batches_hold_every_sample_once_the_longest_first():
    samples = make_samples()
    batches = list(padded_batches(samples, 3, torch.device("cpu")))
    assert sorted(place for places, _, _ in batches for place in places) == list(range(7))
    lengths = [int(row.sum()) for _, _, mask in batches for row in mask]
    assert lengths == sorted(lengths, reverse=True)
    for places, ids, mask in batches:
        for place, row, own in zip(places, ids, mask, strict=True):
            assert row[own == 1].tolist() == samples[place].tokens.tolist()
