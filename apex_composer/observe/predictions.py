"""How well a model predicts samples: loss of each, and whether greedy decoding gives the answer.

Shape legend
    B  samples of a forward pass        S  tokens of the longest of them
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apex_composer.data_prep.progress import progress_bar
from apex_composer.evaluate.perplexity import IGNORED, Loss, combine, make_batch, token_losses
from apex_composer.evaluate.samples import Sample

Domains = Mapping[str, Sequence[Sample]]


class Predictions(NamedTuple):
    """Of every sample, in their order, domain after domain.

    Attributes:
        losses: by domain, [samples, 2] float64: cross entropy summed over the predicted tokens (the
            answer's, or all but the first), in nats, and their number.
        exact: [samples] bool, whether all tokens of the answer are the most probable ones; None
            where a sample has no answer.
    """

    losses: dict[str, Tensor]
    exact: Tensor | None

    def mean_loss(self) -> Loss:
        """Nats per token, and their standard error, as `apex-composer eval` has them."""
        return combine(self.losses)

    def mean_change(self, whole: "Predictions") -> Loss:
        """The same of the difference to other predictions of the same samples.

        Its error is that of pairs: most of what makes one sample harder than another drops out.
        """
        changes = {
            name: torch.stack([own[:, 0] - whole.losses[name][:, 0], own[:, 1]], dim=1)
            for name, own in self.losses.items()
        }
        return combine(changes)


def padded_batches(
    samples: Sequence[Sample], batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Samples of like lengths together, the longest first, so that memory runs out soon if at all.

    Args:
        samples: of any lengths.
        batch_size: samples of a batch at most.
        device: where the batch is wanted.

    Yields:
        Places of the batch's samples, and what `make_batch` makes of them.
    """
    order = sorted(range(len(samples)), key=lambda place: -len(samples[place].tokens))
    for begin in range(0, len(order), batch_size):
        places = order[begin : begin + batch_size]
        batch = make_batch([samples[place] for place in places])
        yield places, {key: value.to(device) for key, value in batch.items()}


@torch.inference_mode()
def predict(
    model: nn.Module, domains: Domains, *, batch_size: int = 8, title: str = "loss"
) -> Predictions:
    """Losses of samples, and exact matches where all of them have answers.

    An exact match is that of greedy decoding, without decoding: token t of the answer is decoded
    from the prompt and the tokens decoded before it. As long as those are the answer's own, this is
    the context of the forward pass over prompt and answer, so that all of its most probable tokens
    are the answer's if and only if (by induction over t) greedy decoding gives the answer. Where
    two logits are next to equal, other kernels (those of a cache) may decide otherwise.

    Args:
        model: a causal language model in evaluation mode, on the device that it is to run on.
        domains: samples of any lengths.
        batch_size: samples of a forward pass.
        title: of the progress bar.
    """
    samples = [sample for own in domains.values() for sample in own]
    answered = all(sample.answer is not None for sample in samples)
    losses = torch.zeros(len(samples), 2, dtype=torch.float64)
    exact = torch.zeros(len(samples), dtype=torch.bool) if answered else None
    device = next(model.parameters()).device
    with progress_bar(desc=title, total=sum(len(s.tokens) for s in samples), unit="tok") as bar:
        for places, batch in padded_batches(samples, batch_size, device):
            targets = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
            losses[places] = token_losses(logits, targets).cpu()
            if exact is not None:
                right = (logits.argmax(-1) == targets) | (targets == IGNORED)
                exact[places] = right.all(1).cpu()
            bar.update(int(batch["attention_mask"].sum()))
    parts = losses.split([len(own) for own in domains.values()])
    return Predictions(dict(zip(domains, parts, strict=True)), exact)
