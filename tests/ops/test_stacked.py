"""Several operators at once compute what each computes by itself."""

import pytest
import torch

from apex_composer.ops import reference, stacked
from apex_composer.ops.monarch import MonarchFactors

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("shape", [(1, 2, 3, 5), (3, 2, 2, 7), (2, 3, 5, 1), (2, 2, 3, 0)])
def test_stacked_operators_equal_the_reference(shape):
    """Weights in which P are the first n rows and N the last n."""
    m, p, q, d = shape
    n = p * q
    factors = MonarchFactors(
        torch.randn(m, q, p, p, dtype=torch.float64), torch.randn(m, p, q, q, dtype=torch.float64)
    )
    weight = torch.randn(m, 2 * n, d, dtype=torch.float64)
    gradient = torch.randn(m, 2 * n, d, dtype=torch.float64)
    advantageous, disadvantageous = torch.arange(n), torch.arange(n, 2 * n)
    selected, received = weight[:, :n], gradient[:, n:]
    deltas = stacked.expand(factors, selected)
    shares, additions = stacked.map_gradient(factors, selected, received)
    assert deltas.shape == additions.shape == (m, n, d)
    for i in range(m):
        own = MonarchFactors(*(f[i] for f in factors))
        expected = reference.expand(weight[i], own, advantageous, axis=0)
        torch.testing.assert_close(deltas[i], expected)
        changed = gradient[i].clone()
        parts = reference.map_gradient(
            weight[i], changed, own, advantageous, disadvantageous, axis=0
        )
        torch.testing.assert_close(additions[i], changed[:n] - gradient[i, :n])
        for share, part in zip(shares, parts, strict=True):
            torch.testing.assert_close(share[i], part)
