"""The models that arms go on from: trained once each, known by the hash of all their numbers."""

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import progress_bar
from reproduce.idle_units import SIZE, make_idle
from reproduce.model import BatchOrder, build_model, make_optimizer, train
from reproduce.scales import Scale
from reproduce.texts import Texts, windows
from torch import Tensor, nn

# Batches between two looks at a base's training, and seconds between two saves of it, from which a
# killed one goes on.
_STRETCH = 500
_SECONDS = 60.0
# Batches whose norms say which units become idle.
_ASSESSED = 16
SEED = 17


@dataclass(frozen=True)
class Kind:
    """What a base is trained on, and what its arms go on with.

    Attributes:
        domains: those it reads; default all.
        continued: those that its arms read; default all.
        length: factor of the scale's window; batches keep their number of tokens.
        batches: factor of the scale's.
        idle: share of every layer's units that do next to nothing, see `idle_units.py`: `mixture`
            is trained on for `batches`, at the rate at which it ended, while they are held.
    """

    domains: tuple[str, ...] | None = None
    continued: tuple[str, ...] | None = None
    length: float = 1.0
    batches: float = 1.0
    # Not in the names of the other kinds' files, in which it changes nothing.
    idle: float = field(default=0.0, repr=False)


KINDS = {
    "mixture": Kind(),
    "scratch": Kind(batches=0),  # random weights (paper C.3)
    # A change of text at the start, and one of context, as from 2,048 to 4,096 in the paper.
    "shift": Kind(domains=("github",), continued=("documentation", "packages")),
    "context": Kind(length=0.5),
    # As many units that masking does not miss as the paper's threshold selects.
    "superfluous": Kind(batches=0.125, idle=0.125),
}


class Base(NamedTuple):
    """A trained model with its optimizer's state, on the CPU.

    Attributes:
        name: in KINDS.
        hash: of all numbers.
        model: its state.
        optimizer: its optimizer's; none for random weights.
        batches: that it was trained for.
    """

    name: str
    hash: str
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any] | None
    batches: int


def chosen(texts: Texts, domains: tuple[str, ...] | None) -> Texts:
    """The texts of some domains.

    Raises:
        ValueError: where one is missing.
    """
    if domains is None:
        return texts
    missing = sorted(set(domains) - set(texts.domains))
    if missing:
        raise ValueError(
            f"this base needs the domains {', '.join(domains)}, the text has "
            f"{', '.join(texts.domains)}: {', '.join(missing)} missing"
        )
    streams = {
        split: {domain: own[domain] for domain in domains} for split, own in texts.streams.items()
    }
    return replace(texts, domains=domains, streams=streams)


def get_base(name: str, scale: Scale, texts: Texts, folder: Path, device: torch.device) -> Base:
    """The base from its file, or trained now.

    Args:
        name: in KINDS.
        scale: its settings.
        texts: what is read.
        folder: of bases; a file's name has the settings' hash, so that no other's is taken.
        device: where it is trained.
    """
    kind = KINDS[name]
    identity = name, kind, SEED, texts.hash, _trained_by(scale)
    identity += (kind.idle, SIZE, _ASSESSED) if kind.idle else ()
    path = folder / f"{name}-{_digest(repr(identity).encode())[:12]}.pt"
    if not path.exists():
        origin = get_base("mixture", scale, texts, folder, device) if kind.idle else None
        _train_base(kind, scale, texts, path, device, name, origin)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return Base(name, state_hash(saved), saved["model"], saved["optimizer"], saved["batches"])


def _trained_by(scale: Scale) -> dict[str, Any]:
    needed = ("sizes", "batch", "base_batches", "warmup", "base_rate", "base_end", "device")
    return {setting: scale.facts()[setting] for setting in needed}


def base_rate(scale: Scale, batches: int, place: int) -> float:
    """Learning rate of batch `place`: a linear warmup, a cosine to `base_end`, which then stays."""
    if place < scale.warmup:
        return scale.base_rate * (place + 1) / scale.warmup
    part = min(1.0, (place - scale.warmup) / max(1, batches - scale.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * part))
    return scale.base_rate * (scale.base_end + (1 - scale.base_end) * cosine)


def _train_base(
    kind: Kind,
    scale: Scale,
    texts: Texts,
    path: Path,
    device: torch.device,
    name: str,
    origin: Base | None,
) -> None:
    model = build_model(scale.sizes, texts.vocabulary, device, SEED)
    optimizer, done = make_optimizer(model), 0
    if origin is not None:
        done = _load(model, optimizer, origin._asdict())
    first, batches = done, done + round(kind.batches * scale.base_batches)
    if not batches:
        _save(path, model, None, 0)
        return
    length = round(kind.length * scale.sizes.length)
    own = windows(chosen(texts, kind.domains), "base", length)
    order = BatchOrder(own, round(scale.batch / kind.length), SEED, device)
    if kind.idle:
        hold = make_idle(model, [order.batch(place) for place in range(_ASSESSED)], kind.idle)
        optimizer.register_step_post_hook(lambda *_: hold())
    partial = path.with_suffix(".partial")
    if partial.exists():
        # On the CPU, where AdamW counts its steps: on a GPU each would be waited for.
        saved = torch.load(partial, map_location="cpu", weights_only=True)
        done = _load(model, optimizer, saved)
    rate = lambda place: base_rate(scale, first or batches, place)  # noqa: E731
    saved_at = time.monotonic()
    with progress_bar(
        None, total=batches - first, initial=done - first, desc=f"base {name}", unit="batch"
    ) as bar:
        for places in _stretches(done, batches):
            losses = train(model, optimizer, order, places, rate)
            bar.set_postfix_str(f"loss {float(losses.mean()):.4f}", refresh=False)
            bar.update(len(places))
            if places.stop == batches or time.monotonic() - saved_at >= _SECONDS:
                _save(partial, model, optimizer, places.stop)
                saved_at = time.monotonic()
    os.replace(partial, path)


def _load(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> int:
    """Put a state in place, whose tensors the optimizer takes as they are; its batches."""
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["batches"]


def _stretches(done: int, batches: int) -> Iterator[range]:
    for start in range(done, batches, _STRETCH):
        yield range(start, min(start + _STRETCH, batches))


def _save(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, batches: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "batches": batches,
    }
    temporary = path.with_name(path.name + ".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def state_hash(state: Mapping[str, Any]) -> str:
    """sha256 of the names and the bytes of all tensors, those of an optimizer too.

    Args:
        state: tensors, numbers and mappings of them.
    """
    digest = hashlib.sha256()
    for name, value in sorted(_leaves(state)):
        digest.update(name.encode())
        digest.update(value)
    return digest.hexdigest()


def _leaves(state: Any, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    if isinstance(state, Tensor):
        yield prefix, state.detach().cpu().contiguous().numpy().tobytes()
    elif isinstance(state, Mapping):
        for name, value in state.items():
            yield from _leaves(value, f"{prefix}/{name}")
    elif isinstance(state, list | tuple):
        for place, value in enumerate(state):
            yield from _leaves(value, f"{prefix}/{place:06d}")
    else:
        yield prefix, repr(state).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
