"""An activation that is handed on as it is, with a penalty's gradient.

Shape legend
    B  samples of one microbatch: rows, or the sequences of packed rows    U  units of a group
    n  U * unit_size, the width of the activation
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apex_composer.ops.packed_samples import PackedSamples
from apex_composer.ops.reference import packed_square_sums, unit_square_sums


@dataclass
class Layout:
    """Where the samples of the running microbatch are, and how much each of them weighs.

    Attributes:
        mask: [rows, tokens] bool, the tokens that count; None: all.
        padded: whether there may be others.
        packed: samples of packed rows; None: a row is one.
        weight: of a sample and group in the gradient.
    """

    mask: Tensor | None
    padded: bool
    packed: PackedSamples | None
    weight: float


class Penalised(torch.autograd.Function):
    """An activation as it is, whose gradient has that of the penalty added.

    d std / d x_i = (a_i - mean a) / (U std) * x_i / a_i,   0 where std or a_i is 0
    """

    @staticmethod
    def forward(ctx, activation: Tensor, unit_size: int, layout: Layout) -> tuple[Tensor, Tensor]:
        """The activation, and the standard deviations of its samples' norms, [B].

        Args:
            ctx: torch's.
            activation: [rows, tokens, n], or [kept tokens, n] where a model drops padding.
            unit_size: head_dim for heads, 1 for channels.
            layout: of the activation's samples.
        """
        if layout.packed is not None:
            norms = packed_square_sums(activation, unit_size, layout.packed).sqrt()
        else:
            # Without a sample axis even a full mask is needed, to tell the samples apart.
            mask = layout.mask if layout.padded or activation.dim() == 2 else None
            norms = unit_square_sums(activation, unit_size, mask).sqrt()
        away = norms - norms.mean(1, keepdim=True)
        deviations = away.square().mean(1).sqrt()
        below = norms.shape[1] * deviations.unsqueeze(1) * norms
        factors = torch.where(below > 0, layout.weight * away / below, 0)
        ctx.save_for_backward(activation, factors)
        ctx.unit_size, ctx.layout = unit_size, layout
        ctx.mark_non_differentiable(deviations)
        return activation.view_as(activation), deviations

    @staticmethod
    def backward(ctx, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """The gradient with the penalty's."""
        activation, factors = ctx.saved_tensors
        factors = factors.to(activation.dtype).repeat_interleave(ctx.unit_size, dim=1)
        own = activation * _by_token(factors, activation, ctx.layout)
        packed = ctx.layout.packed
        if activation.dim() == 3 and (packed is not None or ctx.layout.padded):
            counted = ctx.layout.mask if packed is None else packed.counted
            own = own.masked_fill(~counted.unsqueeze(-1), 0)
        return gradient + own, None, None


def _by_token(factors: Tensor, activation: Tensor, layout: Layout) -> Tensor:
    """Every sample's factors, [B, n], at its tokens: of a shape that fits the activation's."""
    unpadded = activation.dim() == 2
    if layout.packed is not None:
        lengths = layout.packed.kept if unpadded else layout.packed.lengths
        return factors.repeat_interleave(lengths, dim=0).view(activation.shape)
    if unpadded:
        return factors.repeat_interleave(layout.mask.count_nonzero(dim=1), dim=0)
    return factors.unsqueeze(1)
