"""FLOPs of the operators' work are those that torch counts on the reference path."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from apex_composer.operators.flops import fold_flops, map_flops
from apex_composer.ops.monarch import init_factors
from apex_composer.ops.reference import fold, map_gradient


@pytest.mark.parametrize("rows", [16, 24, 704])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_step_of_one_weight(rows, axis):
    columns, generator = 10, torch.Generator().manual_seed(0)
    shape = (2 * rows, columns) if axis == 0 else (columns, 2 * rows)
    weight, gradient = torch.randn(2, *shape, generator=generator)
    factors = init_factors(rows, generator=generator)
    sides = torch.arange(rows), torch.arange(rows, 2 * rows)
    with FlopCounterMode(display=False) as counter:
        fold(weight, factors, *sides, axis=axis)
    assert counter.get_total_flops() == fold_flops(rows, columns)
    with FlopCounterMode(display=False) as counter:
        map_gradient(weight, gradient, factors, *sides, axis=axis)
    assert counter.get_total_flops() == map_flops(rows, columns)
