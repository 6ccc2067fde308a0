"""The models of a campaign, and the loop that trains and evaluates them: torch on the core."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from reproduce.scales import Sizes
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

BETAS, WEIGHT_DECAY, LARGEST_NORM = (0.9, 0.95), 0.1, 1.0

# batches trained so far -> learning rate of the next one
Schedule = Callable[[int], float]


def build_model(sizes: Sizes, vocabulary: int, device: torch.device, seed: int) -> nn.Module:
    """A Llama with random float32 weights; the same seed gives the same on every device.

    Args:
        sizes: of the model.
        vocabulary: number of tokens.
        device: where it will train.
        seed: of its weights.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.channels,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.length,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device=device, dtype=torch.float32).train()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over all weights, with the settings of the paper's continued pre-training."""
    return torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=BETAS, weight_decay=WEIGHT_DECAY, foreach=True
    )


def compute(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 by autocast on a GPU, float32 on the CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def token_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Cross-entropy of every token but a window's first, [windows, length], in float32.

    Args:
        model: a causal language model.
        windows: [windows, length + 1], int64.
    """
    with compute(windows.device):
        logits = model(input_ids=windows[:, :-1]).logits
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    ).view(windows.shape[0], -1)


class BatchOrder:
    """Batches of windows in an order that the seed alone decides; every arm sees the same.

    Args:
        windows: [windows, length + 1] by domain, in the order of their names.
        batch: windows of a batch.
        seed: of the order. Every epoch has its own.
        device: where batches go.
    """

    def __init__(
        self, windows: Mapping[str, np.ndarray], batch: int, seed: int, device: torch.device
    ):
        self._parts = [windows[domain] for domain in sorted(windows)]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self._batch, self._seed, self._device = batch, seed, device
        self.epoch_batches = int(self._starts[-1]) // batch
        if not self.epoch_batches:
            raise ValueError(
                f"{int(self._starts[-1])} windows of text do not fill a batch of {batch}: give "
                "more text, or a smaller scale"
            )
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, place: int) -> Tensor:
        """Batch number `place`, counted from 0, over as many epochs as it takes."""
        epoch, within = divmod(place, self.epoch_batches)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._order = epoch, generator.permutation(int(self._starts[-1]))
        chosen = self._order[1][within * self._batch : (within + 1) * self._batch]
        rows = [self._row(int(one)) for one in chosen]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        if self._device.type == "cuda":
            ids = ids.pin_memory()
        return ids.to(self._device, non_blocking=True)

    def _row(self, place: int) -> np.ndarray:
        part = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._parts[part][place - self._starts[part]]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    order: BatchOrder,
    batches: Iterable[int],
    schedule: Schedule,
    *,
    forward: Callable[[], AbstractContextManager[None]] = nullcontext,
    clip: Callable[[float], object] | None = None,
) -> Tensor:
    """Train on the given batches, one step each; their losses, [batches], on the device.

    Args:
        model: in train mode.
        optimizer: of its weights.
        order: of the data.
        batches: their numbers, counted over the whole run.
        schedule: learning rate by the number of the batch.
        forward: a context around every forward pass (the assessment).
        clip: clips gradients to a norm; default torch's own.
    """
    clip = clip or (lambda norm: nn.utils.clip_grad_norm_(model.parameters(), norm))
    losses = []
    for place in batches:
        for group in optimizer.param_groups:
            group["lr"] = schedule(place)
        optimizer.zero_grad(set_to_none=True)
        with forward():
            loss = token_losses(model, order.batch(place)).mean()
        loss.backward()
        clip(LARGEST_NORM)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: Mapping[str, np.ndarray], at_once: int, device: torch.device
) -> dict[str, float]:
    """Mean loss of every domain's held-out tokens in nats, summed in float64.

    Args:
        model: left in train mode (it has no dropout).
        windows: held-out ones by domain.
        at_once: windows of one forward pass.
        device: of the model.

    Raises:
        FloatingPointError: where a domain's loss is no finite number.
    """
    found = {}
    for domain, own in windows.items():
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part in _parts(own, at_once):
            ids = torch.from_numpy(part.astype(np.int64)).to(device)
            total += token_losses(model, ids).double().sum()
        found[domain] = float(total) / (len(own) * (own.shape[1] - 1))
        if not np.isfinite(found[domain]):
            raise FloatingPointError(f"the loss on {domain} is {found[domain]}: the run diverged")
    return found


def _parts(windows: np.ndarray, at_once: int) -> Iterator[np.ndarray]:
    for start in range(0, len(windows), at_once):
        yield windows[start : start + at_once]
