"""silu(gate) * up, forward and backward, with the sums of squares that APEX ranks channels by.

Shape legend
    gate, up, product [B, S, C] or [..., C];   square_sums [B, C], per sample and channel
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language.extra import libdevice

from apex_composer.triton_kernels import tiles
from apex_composer.triton_kernels.availability import interpreted, on_device
from apex_composer.triton_kernels.norms import (
    check_activation,
    check_sums,
    check_values,
    finish_sums,
    first_stage,
    mask_bytes,
)


@triton.jit
def _one_plus_exp(x, INTERPRETED: tl.constexpr):
    # CUDA's expf is the one that torch uses; tl.exp is a faster approximation, which changes the
    # rounded result of one value in some thousands. The interpreter knows only tl.exp.
    if INTERPRETED:
        return 1.0 + tl.exp(x)
    return 1.0 + libdevice.exp(x)


@triton.jit
def _tile_of_program(width, COLUMNS: tl.constexpr):
    # Programs that run at the same time work on the same tokens: whole rows of memory.
    parts = tl.cdiv(width, COLUMNS)
    return tl.program_id(0) // parts, tl.program_id(0) % parts


@triton.jit(do_not_specialize=["turns", "splits"])
def swiglu_forward_kernel(
    gate, up, product, mask, partials, tokens, width,
    gate_sample, gate_token, up_sample, up_token, turns, splits,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, COUNTED: tl.constexpr, MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`F.silu(gate) * up` for `turns` tiles of tokens and one of columns; its sums of squares."""
    split, part = _tile_of_program(width, COLUMNS)
    sample = tl.program_id(1).to(tl.int64)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for turn in range(turns):
        rows = (split * turns + turn) * TOKENS + tl.arange(0, TOKENS)
        present = rows < tokens
        line = rows.to(tl.int64)[:, None]
        loaded = present[:, None] & inside[None, :]
        places = sample * gate_sample + line * gate_token + columns[None, :]
        x = tl.load(gate + places, mask=loaded, other=0.0).to(tl.float32)
        places = sample * up_sample + line * up_token + columns[None, :]
        factor = tl.load(up + places, mask=loaded, other=0.0).to(tl.float32)
        # Rounded where eager mode rounds: silu's result, then the product.
        silu = tl.div_rn(x, _one_plus_exp(-x, INTERPRETED)).to(product.dtype.element_ty)
        result = (silu.to(tl.float32) * factor).to(product.dtype.element_ty)
        places = (sample * tokens + line) * width + columns[None, :]
        tl.store(product + places, result, mask=loaded)
        if COUNTED:
            counted = present
            if MASKED:
                counted &= tl.load(mask + sample * tokens + rows, mask=present, other=0) != 0
            rounded = tl.where(counted[:, None], result.to(tl.float32), 0.0)
            total += rounded * rounded
    if COUNTED:
        place = (sample * splits + split) * width + columns
        tl.store(partials + place, tl.sum(total, axis=0), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    incoming, gate, up, gate_gradient, up_gradient, tokens, width,
    incoming_token, gate_token, up_token,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, FOR_GATE: tl.constexpr, FOR_UP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Autograd's gradients of `F.silu(gate) * up` for one tile; silu(gate) is computed again."""
    place, part = _tile_of_program(width, COLUMNS)
    rows = place * TOKENS + tl.arange(0, TOKENS)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < tokens)[:, None] & (columns < width)[None, :]
    line, column = rows.to(tl.int64)[:, None], columns[None, :]
    received = tl.load(incoming + line * incoming_token + column, mask=mask, other=0.0)
    received = received.to(tl.float32)
    x = tl.load(gate + line * gate_token + column, mask=mask, other=0.0).to(tl.float32)
    divisor = _one_plus_exp(-x, INTERPRETED)
    # Rounded where autograd's eager formulas round, see swiglu_forward_kernel.
    if FOR_UP:
        silu = tl.div_rn(x, divisor).to(gate.dtype.element_ty).to(tl.float32)
        result = (received * silu).to(up_gradient.dtype.element_ty)
        tl.store(up_gradient + line * width + column, result, mask=mask)
    if FOR_GATE:
        factor = tl.load(up + line * up_token + column, mask=mask, other=0.0).to(tl.float32)
        of_silu = (received * factor).to(gate.dtype.element_ty).to(tl.float32)
        sigmoid = 1.0 / divisor
        result = of_silu * sigmoid * (1.0 + x * (1.0 - sigmoid))
        result = result.to(gate_gradient.dtype.element_ty)
        tl.store(gate_gradient + line * width + column, result, mask=mask)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, square_sums, mask):
        ctx.save_for_backward(gate, up)
        return _forward(gate, up, square_sums, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming):
        gate, up = ctx.saved_tensors
        return *_backward(incoming, gate, up, *ctx.needs_input_grad[:2]), None, None


def swiglu(
    gate: Tensor, up: Tensor, square_sums: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """silu(gate) * up, and on request the product's sums of squares per sample and channel.

    Values and gradients are rounded where eager mode rounds F.silu(gate) * up: silu is computed
    in float32 and cast to the dtype, then multiplied and cast again. Only gate and up are kept for
    the backward pass, which computes silu again.

    Args:
        gate: [..., C], float32, bfloat16 or float16, contiguous in its last dimension.
        up: like gate.
        square_sums: [B, C], float32, with contiguous rows, to be filled with the sums of squares
            of the rounded product over the tokens of each sample; gate must be [B, S, C] then.
            No gradient flows through it. A recomputed forward pass (activation checkpointing)
            fills it again, with the same numbers. Default none.
        mask: [B, S], true (not 0) for tokens that count in `square_sums`. The product does not
            depend on it. Default all.

    Returns:
        [..., C], of gate's dtype, contiguous.

    Raises:
        RuntimeError: if the kernels cannot run on the tensors' device.
        ValueError: for tensors that do not fit.
    """
    for what in ("shape", "dtype", "device"):
        ours, other = getattr(gate, what), getattr(up, what)
        if ours != other:
            raise ValueError(f"gate has {what} {ours}, up has {other}: they must be alike")
    for name, values in (("gate", gate), ("up", up)):
        check_values(name, values)
    if square_sums is not None:
        check_activation("gate", gate)
        check_sums("square_sums", square_sums, (gate.shape[0], gate.shape[2]), gate.device)
        mask = mask_bytes(mask, gate)
    return _SwiGLU.apply(gate, up, square_sums, mask)


def _one_sample(tensor: Tensor) -> Tensor:
    """[..., C] as [1, rows, C]: a view, or a copy where the leading dimensions do not merge."""
    return tensor.reshape(1, -1, tensor.shape[-1])


def _forward(gate: Tensor, up: Tensor, square_sums: Tensor | None, mask: Tensor | None) -> Tensor:
    product = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        if square_sums is not None:
            square_sums.zero_()
        return product
    partials, warps = None, 4
    if square_sums is not None:
        plan, partials = first_stage(gate)
        warps = tiles.SUM_WARPS
    else:
        gate, up = _one_sample(gate), _one_sample(up)
        plan = tiles.elementwise_tiles(*gate.shape[1:])
    samples, tokens, width = gate.shape
    with on_device(gate.device):
        swiglu_forward_kernel[(plan.splits * tiles.divide_up(width, plan.columns), samples)](
            gate, up, product, mask, partials, tokens, width, *gate.stride()[:2],
            *up.stride()[:2], plan.turns, plan.splits, plan.tokens, plan.columns,
            square_sums is not None, square_sums is not None and mask is not None,
            interpreted(), num_warps=warps,
        )  # fmt: skip
        if square_sums is not None:
            finish_sums(partials, square_sums, 1)
    return product


def _backward(
    incoming: Tensor, gate: Tensor, up: Tensor, for_gate: bool, for_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    shape = gate.shape
    new = {"dtype": gate.dtype, "device": gate.device}
    gate_gradient = torch.empty(shape, **new) if for_gate else None
    up_gradient = torch.empty(shape, **new) if for_up else None
    if gate.numel() == 0 or not (for_gate or for_up):
        return gate_gradient, up_gradient
    # A loss like product.sum() hands down an expanded tensor, which has no contiguous dimension.
    incoming, gate, up = (_one_sample(t) for t in (incoming.contiguous(), gate, up))
    plan = tiles.elementwise_tiles(*gate.shape[1:])
    with on_device(gate.device):
        swiglu_backward_kernel[(plan.splits * tiles.divide_up(gate.shape[2], plan.columns),)](
            incoming, gate, up, gate_gradient, up_gradient, *gate.shape[1:],
            incoming.stride(1), gate.stride(1), up.stride(1),
            plan.tokens, plan.columns, for_gate, for_up, interpreted(),
        )  # fmt: skip
    return gate_gradient, up_gradient
