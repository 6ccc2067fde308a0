"""Per sample and unit, the sum of squares of an activation, in one pass over memory.

Shape legend
    B samples, S tokens, U units of unit_size columns, width = U * unit_size
    partials [B, splits, width]   sums over the tokens of a split, float32
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from apex_composer.triton_kernels import tiles
from apex_composer.triton_kernels.availability import mark_written, on_device, require

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["turns", "splits"])
def sum_tokens_kernel(
    activation, mask, partials, tokens, width, sample_stride, token_stride, turns, splits,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, TURNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The first stage of `ops.reference.unit_square_sums`: over the tokens of one split."""
    split, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in range(0, turns, TURNS):
        for turn in tl.static_range(TURNS):  # their loads do not wait for each other
            rows = (split * turns + first + turn) * TOKENS + tl.arange(0, TOKENS)
            counted = rows < tokens
            if MASKED:
                counted &= tl.load(mask + sample * tokens + rows, mask=counted, other=0) != 0
            places = sample * sample_stride + rows.to(tl.int64)[:, None] * token_stride
            loaded = counted[:, None] & inside[None, :]
            values = tl.load(activation + places + columns[None, :], mask=loaded, other=0.0)
            values = values.to(tl.float32)
            total += values * values
    place = (sample * splits + split) * width + columns
    tl.store(partials + place, tl.sum(total, axis=0), mask=inside)


@triton.jit
def sum_splits_and_units_kernel(
    partials, sums, width, units, sums_stride, splits,
    SPLITS: tl.constexpr, UNITS: tl.constexpr, UNIT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The second stage of `ops.reference.unit_square_sums`: over splits and columns of a unit."""
    sample = tl.program_id(1).to(tl.int64)
    line = tl.arange(0, UNITS * PADDED)
    unit, within = tl.program_id(0) * UNITS + line // PADDED, line % PADDED
    present = (unit < units) & (within < UNIT)
    split = tl.arange(0, SPLITS)
    places = (sample * splits + split)[:, None] * width + (unit * UNIT + within)[None, :]
    loaded = (split < splits)[:, None] & present[None, :]
    values = tl.sum(tl.load(partials + places, mask=loaded, other=0.0), axis=0)
    result = tl.sum(tl.reshape(values, (UNITS, PADDED)), axis=1)
    written = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    tl.store(sums + sample * sums_stride + written, result, mask=written < units)


@torch.no_grad()
def unit_square_sums(
    activation: Tensor, unit_size: int, mask: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """a_i(x)^2: per sample and unit, the sum of squares of the unit's activation (paper eq. 3).

    The sums are in float32, in an order that depends on the activation's tokens and width alone:
    a sample's result does not depend on the samples beside it, and every run gives the same bits.

    Args:
        activation: [B, S, U * unit_size], float32, bfloat16 or float16, contiguous in its last
            dimension.
        unit_size: head_dim for heads, 1 for channels.
        mask: [B, S], any dtype, true (not 0) where a token counts; the values of other tokens are
            not read. None counts every token.
        out: [B, U], float32, with contiguous rows, to be filled; may be a part of a larger
            buffer. None makes a new tensor.

    Returns:
        `out`.

    Raises:
        RuntimeError: if the kernels cannot run on the activation's device.
        ValueError: for tensors that do not fit.
    """
    check_activation("activation", activation)
    samples, tokens, width = activation.shape
    if unit_size < 1 or width % unit_size:
        raise ValueError(
            f"unit_size is {unit_size}, the activation's {width} columns are no multiple of it"
        )
    shape = (samples, width // unit_size)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=activation.device)
    check_sums("out", out, shape, activation.device)
    mask = mask_bytes(mask, activation)
    if activation.numel() == 0:
        return out.zero_()
    plan, partials = first_stage(activation)
    with on_device(activation.device):
        sum_tokens_kernel[(tiles.divide_up(width, plan.columns), plan.splits, samples)](
            activation, mask, partials, tokens, width, *activation.stride()[:2], plan.turns,
            plan.splits, plan.tokens, plan.columns, tiles.SUM_TURNS, mask is not None,
            num_warps=tiles.SUM_WARPS,
        )  # fmt: skip
        finish_sums(partials, out, unit_size)
    return out


def first_stage(activation: Tensor) -> tuple[tiles.TokenTiles, Tensor]:
    """The first stage's tiles, and memory for its results, [B, splits, width]."""
    samples, tokens, width = activation.shape
    plan = tiles.token_tiles(tokens, width)
    new = {"dtype": torch.float32, "device": activation.device}
    return plan, torch.empty(samples, plan.splits, width, **new)


def finish_sums(partials: Tensor, out: Tensor, unit_size: int) -> None:
    """The second stage: from [B, splits, width] to `out` [B, U]."""
    samples, splits, width = partials.shape
    units, padded = width // unit_size, tiles.power_of_two(unit_size)
    at_once = max(1, min(tiles.SUM_COLUMNS // padded, tiles.power_of_two(units)))
    sum_splits_and_units_kernel[(tiles.divide_up(units, at_once), samples)](
        partials, out, width, units, out.stride(0), splits,
        tiles.power_of_two(splits), at_once, unit_size, padded,
    )  # fmt: skip
    mark_written(out)


def check_activation(name: str, activation: Tensor) -> None:
    """Raise unless a kernel can read `activation` as [B, S, width]."""
    check_values(name, activation)
    if activation.dim() != 3:
        raise ValueError(
            f"{name} has shape {tuple(activation.shape)}, allowed: [samples, tokens, width]. "
            "Without a sample axis use the torch implementation"
        )


def check_values(name: str, values: Tensor) -> None:
    """Raise unless a kernel can read the lines of `values` [..., width]."""
    require(values.device)
    if values.dtype not in DTYPES:
        raise ValueError(f"{name} is {values.dtype}, allowed: {', '.join(str(d) for d in DTYPES)}")
    if values.shape[-1] > 1 and values.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {values.stride()}, its last dimension must be contiguous: "
            f"give {name}.contiguous()"
        )


def check_sums(name: str, sums: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    """Raise unless `sums` can take the results."""
    if tuple(sums.shape) != shape or sums.dtype != torch.float32 or sums.device != device:
        raise ValueError(
            f"{name} is {tuple(sums.shape)} {sums.dtype} on {sums.device}, needed: {shape} "
            f"torch.float32 on {device}"
        )
    if sums.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient flows through it: detach it")
    if shape[1] > 1 and sums.stride(1) != 1:
        raise ValueError(f"{name} has strides {sums.stride()}, its rows must be contiguous")


def mask_bytes(mask: Tensor | None, activation: Tensor) -> Tensor | None:
    """The mask as contiguous bytes, which are 0 where a token does not count."""
    if mask is None:
        return None
    if mask.shape != activation.shape[:2]:
        raise ValueError(
            f"the attention mask is for {tuple(mask.shape)} samples and tokens, the activation "
            f"has {tuple(activation.shape[:2])}: give each forward pass its own mask"
        )
    if mask.device != activation.device:
        raise ValueError(f"the mask is on {mask.device}, the activation on {activation.device}")
    return mask.bool().contiguous().view(torch.uint8)
