"""The gradient of the penalty is autograd's, for every layout of samples."""

import pytest
import torch
from by_hand import norm_deviations

from apex_composer.methods.penalised_activation import Layout, Penalised
from apex_composer.ops.packed_samples import find_samples

PACKED = torch.tensor([[0] * 3 + [1] * 5, [0] * 8, [0, 1, 1, 1, 2, 2, -1, -1], [0] * 6 + [-1] * 2])
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [0] * 8, [0] * 2 + [1] * 6], dtype=torch.bool)
PADDED = MASK.long() - 1  # as ids: one sample in each row, none in the third

LAYOUTS = {
    "rows": (torch.zeros(4, 8, dtype=torch.long), Layout(None, False, None, 0.7)),
    "padded": (PADDED, Layout(MASK, True, None, 0.7)),
    "packed": (PACKED, Layout(None, False, find_samples(PACKED), 0.7)),
}


@pytest.mark.parametrize("unit_size", [1, 4])
@pytest.mark.parametrize("dropped", [False, True], ids=["kept", "dropped"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_autograds(layout, dropped, unit_size):
    """Also where a model drops padding, and with units whose norm is zero."""
    torch.manual_seed(0)
    ids, own = LAYOUTS[layout]
    if dropped and layout == "rows":
        own = Layout(ids >= 0, False, None, own.weight)
    activation = torch.randn(4, 8, 12, dtype=torch.float64)
    activation[0, :3, :4] = 0  # a head, and channels, without a norm in a packed sample
    activation.requires_grad_(True)
    outer = torch.randn_like(activation)
    expected = norm_deviations(activation, unit_size, ids)
    ((activation * outer).sum() + own.weight * sum(expected)).backward()
    wanted, activation.grad = activation.grad.clone(), None
    given = activation[ids >= 0] if dropped else activation
    out, found = Penalised.apply(given, unit_size, own)
    assert torch.equal(out, given)
    (out * (outer[ids >= 0] if dropped else outer)).sum().backward()
    if dropped:
        wanted = wanted.masked_fill((ids < 0).unsqueeze(-1), 0)
    # Autograd has no derivative of a norm of zero; ours is zero.
    assert wanted.isnan().any() == (layout == "packed")
    wanted = torch.where(wanted.isnan(), outer, wanted)
    torch.testing.assert_close(activation.grad, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[found > 0], torch.stack(expected), rtol=1e-12, atol=0)


def test_padding_that_is_no_number_has_no_say():
    activation = torch.ones(1, 3, 4, dtype=torch.float64)
    activation[0, 0] = torch.tensor([1.0, 2, 3, 4])
    activation[0, 2] = torch.inf
    activation.requires_grad_(True)
    mask = torch.tensor([[True, True, False]])
    out, _ = Penalised.apply(activation, 1, Layout(mask, True, None, 1.0))
    out.sum().backward()
    assert torch.equal(activation.grad[0, 2], torch.ones(4, dtype=torch.float64))
    assert activation.grad.isfinite().all() and (activation.grad[0, 0] != 1).any()


def test_bfloat16_is_summed_in_float32():
    """To the precision in which bfloat16 holds the gradient."""
    torch.manual_seed(0)
    wide = torch.randn(2, 300, 16).bfloat16().double().requires_grad_(True)
    (0.7 * sum(norm_deviations(wide, 4, torch.zeros(2, 300)))).backward()
    given = wide.detach().bfloat16().requires_grad_(True)
    out, found = Penalised.apply(given, 4, Layout(None, False, None, 0.7))
    (0 * out).sum().backward()
    assert found.dtype == torch.float32
    assert torch.allclose(given.grad.double(), wide.grad, rtol=2**-6, atol=1e-7)
