"""Loss and perplexity of a causal language model, per domain and in total, with standard errors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from apex_composer.data_prep.progress import progress_bar
from apex_composer.evaluate.samples import Sample

if TYPE_CHECKING:
    from apex_composer.evaluate.texts import Texts

# What is predicted nowhere, as in torch and Composer.
IGNORED = -100
# Logits that are copied to float32 at once: 64 MB, whatever batch and vocabulary are.
_LOGITS = 1 << 24
# Seconds after which a bar is shown.
_DELAY = 2.0


@dataclass(frozen=True)
class Loss:
    """The mean loss over some text.

    Args:
        loss: nats per predicted token.
        error: its standard error over sequences; None where a domain has only one.
        tokens: predicted tokens.
        sequences: samples with such.
    """

    loss: float
    error: float | None
    tokens: int
    sequences: int

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return math.exp(self.loss) if self.loss < math.log(1e308) else math.inf


@dataclass(frozen=True)
class Losses:
    """The mean losses of every domain, and of all predicted tokens together."""

    domains: dict[str, Loss]
    total: Loss


def mean_loss(
    model: Any, texts: "Texts", *, batch_size: int = 8, amp: torch.dtype | None = None
) -> Losses:
    """Measure the mean next-token loss; that of Composer's LanguageCrossEntropy, summed in float64.

    Of text every token but a sample's first is predicted, of an answer its tokens only.

    Args:
        model: a Hugging Face causal language model, on the device to compute on.
        texts: what `read_texts` returns.
        batch_size: samples at a time. Default: 8.
        amp: dtype of autocast, such as torch.bfloat16. Default: none, the weights' own.

    Raises:
        ValueError: a domain has no token to predict, or a loss that is not finite.
    """
    measured = {
        name: sample_losses(model, samples, batch_size=batch_size, amp=amp, name=name)
        for name, samples in texts.domains.items()
    }
    domains = {name: combine({name: pairs}) for name, pairs in measured.items()}
    return Losses(domains, combine(measured))


def sample_losses(
    model: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    amp: torch.dtype | None = None,
    name: str = "text",
) -> Tensor:
    """Sum the loss of every sample.

    Args:
        model, batch_size, amp: as in `mean_loss`.
        samples: of one domain.
        name: the domain's, for the progress bar. Default: text.

    Returns:
        Sum of the losses in nats, and number of predicted tokens: float64 [samples, 2].
    """
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, amp) if amp else nullcontext()
    found = []
    bar = progress_bar(total=len(samples), desc=f"loss of {name}", unit=" samples", delay=_DELAY)
    with bar, _evaluating(model), torch.no_grad(), autocast:
        for start in range(0, len(samples), batch_size):
            stop = min(start + batch_size, len(samples))
            batch = make_batch([samples[place] for place in range(start, stop)])
            batch = {key: value.to(device) for key, value in batch.items()}
            labels = batch.pop("labels")
            logits = model(**batch, use_cache=False).logits
            found.append(token_losses(logits[:, :-1], labels[:, 1:]).cpu())
            bar.update(stop - start)
    return torch.cat(found)


def make_batch(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Pad samples on the right to the longest.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 [samples, length]; labels are not shifted,
        and IGNORED outside of answers and in padding.
    """
    labels = []
    for tokens, answer in samples:
        answer = slice(None) if answer is None else answer
        labels.append(torch.full_like(tokens, IGNORED))
        labels[-1][answer] = tokens[answer]
    tokens = [sample.tokens for sample in samples]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in tokens], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum `-log softmax(logits)[target]` for each row of a batch, in float32 at least.

    Args:
        logits: [samples, length, vocabulary], copied in pieces.
        targets: int64 [samples, length], IGNORED where nothing is predicted.

    Returns:
        Sum, and number of targets: float64 [samples, 2].
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    rows = max(1, _LOGITS // logits.shape[-1] // len(targets))
    for start in range(0, targets.shape[1], rows):
        part = slice(start, start + rows)
        found = cross_entropy(
            logits[:, part].flatten(0, 1).to(dtype),
            targets[:, part].flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        losses[:, part] = found.view(len(targets), -1).double()
    return torch.stack([losses.sum(1), (targets != IGNORED).sum(1).double()], dim=1)


def combine(measured: Mapping[str, Tensor]) -> Loss:
    """Mean loss over domains together, and its standard error over samples within each domain.

    `R = sum s / sum n`, with the sums s of the losses and n tokens of each sample. Samples differ
    in n, so R is a ratio estimator; with `e = s - R n` and N_d samples in domain d, of mean e_d,
    `SE^2 = sum_d N_d / (N_d - 1) sum_i (e_i - e_d)^2 / (sum n)^2`
    (combined ratio estimator of a stratified sample without the correction for a finite population:
    Cochran, Sampling Techniques, 3rd edition 1977, sections 2.11 and 6.11).

    Args:
        measured: what `sample_losses` returns, by domain.

    Raises:
        ValueError: nothing is predicted, or a sum is not finite.
    """
    pairs = {name: found[found[:, 1] > 0] for name, found in measured.items()}
    for name, found in pairs.items():
        if not len(found):
            raise ValueError(f"{name}: there is no token to predict; its samples are too short")
        if not found.isfinite().all():
            raise ValueError(
                f"{name}: the loss is not finite. Weights or activations overflow: give another "
                "dtype (bfloat16 or float32), or look at the checkpoint"
            )
    total, tokens = torch.cat(list(pairs.values())).sum(0).tolist()
    ratio, variance = total / tokens, 0.0
    for found in pairs.values():
        residuals = found[:, 0] - ratio * found[:, 1]
        variance += len(found) * residuals.var().item() if len(found) > 1 else math.nan
    error = math.sqrt(variance) / tokens
    return Loss(
        ratio, None if math.isnan(error) else error, int(tokens), sum(map(len, pairs.values()))
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout, and back to what every module was."""
    were = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in were.items():
            module.training = was
