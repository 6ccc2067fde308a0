"""How well a model predicts samples: loss of each, and whether greedy decoding gives the answer.

Shape legend
    B  samples of a forward pass        S  tokens of the longest of them
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apex_composer.data_prep.progress import progress_bar
from apex_composer.evaluate.samples import Sample


class Predictions(NamedTuple):
    """Of every sample, in their order: sums, so that they add up to a mean over tokens.

    Attributes:
        losses: [samples] float64, cross entropy summed over the predicted tokens, in nats.
        tokens: [samples] int64, how many are predicted: the answer's, or all but the first.
        exact: [samples] bool, whether all tokens of the answer are the most probable ones; None
            where a sample has no answer.
    """

    losses: Tensor
    tokens: Tensor
    exact: Tensor | None

    def mean_loss(self) -> tuple[float, float | None]:
        """Nats per token, and their standard error over the samples."""
        return mean_per_token(self.losses, self.tokens)


def mean_per_token(sums: Tensor, tokens: Tensor) -> tuple[float, float | None]:
    """m = sum(s) / sum(n), and its standard error, that of a ratio of two sums.

    se = sqrt(N / (N - 1) * sum((s_i - m n_i)^2)) / sum(n)

    Source: Cochran, Sampling Techniques, 3rd edition, section 6.3, without its correction for a
    finite population.

    Args:
        sums: s, [N], of each sample over its tokens.
        tokens: n, [N].

    Returns:
        The standard error is None for a single sample.
    """
    count, total = len(sums), float(tokens.sum())
    mean = float(sums.sum()) / total
    if count < 2:
        return mean, None
    squares = float((sums - mean * tokens).square().sum())
    return mean, (count / (count - 1) * squares) ** 0.5 / total


def padded_batches(
    samples: Sequence[Sample], batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Samples of like lengths together, the longest first, so that memory runs out soon if at all.

    Args:
        samples: of any lengths.
        batch_size: samples of a batch at most.
        device: where ids and masks are wanted.

    Yields:
        Places of the batch's samples; ids, [B, S], padded at their ends; mask, [B, S], 1 for tokens
        that count.
    """
    lengths = [len(sample.tokens) for sample in samples]
    order = sorted(range(len(samples)), key=lambda place: -lengths[place])
    for begin in range(0, len(order), batch_size):
        places = order[begin : begin + batch_size]
        ids = torch.zeros(len(places), lengths[places[0]], dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            ids[row, : lengths[place]] = samples[place].tokens
            mask[row, : lengths[place]] = 1
        yield places, ids.to(device), mask.to(device)


@torch.inference_mode()
def predict(
    model: nn.Module, samples: Sequence[Sample], *, batch_size: int = 8, title: str = "loss"
) -> Predictions:
    """Losses of samples, and exact matches where all of them have answers.

    An exact match is that of greedy decoding, without decoding: token t of the answer is decoded
    from the prompt and the tokens decoded before it. As long as those are the answer's own, this is
    the context of the forward pass over prompt and answer, so that all of its most probable tokens
    are the answer's if and only if (by induction over t) greedy decoding gives the answer. Where
    two logits are next to equal, other kernels (those of a cache) may decide otherwise.

    Args:
        model: a causal language model in evaluation mode, on the device that it is to run on.
        samples: of any lengths of 2 at least.
        batch_size: samples of a forward pass.
        title: of the progress bar.
    """
    losses = torch.zeros(len(samples), dtype=torch.float64)
    tokens = torch.zeros(len(samples), dtype=torch.int64)
    exact = torch.zeros(len(samples), dtype=torch.bool)
    device = next(model.parameters()).device
    with progress_bar(desc=title, total=sum(len(s.tokens) for s in samples), unit="tok") as bar:
        for places, ids, mask in padded_batches(samples, batch_size, device):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, place in enumerate(places):
                first, last = _predicted(samples[place])
                targets, own = ids[row, first:last], logits[row, first - 1 : last - 1]
                loss = nn.functional.cross_entropy(_wide(own), targets, reduction="sum")
                losses[place], tokens[place] = loss.double(), last - first
                exact[place] = (own.argmax(-1) == targets).all()
            bar.update(int(mask.sum()))
    answered = all(sample.answer is not None for sample in samples)
    return Predictions(losses, tokens, exact if answered else None)


def _predicted(sample: Sample) -> tuple[int, int]:
    """Bounds of the tokens that are predicted; for the first of all there is no context."""
    if sample.answer is None:
        return 1, len(sample.tokens)
    return max(1, sample.answer.start), sample.answer.stop


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
