"""One site's operator: what it does to weight, bias and gradients."""

import pytest
import torch
from helpers import linear_site, selection
from oracle import dense_operator

from apex_composer.operators.operator import ExpansionOperator
from apex_composer.ops.monarch import MonarchFactors, to_dense

pytestmark = pytest.mark.numeric

# Odd sizes, fused projections, biases.
SITES = {
    "rows": {"rows": 9, "columns": 5},
    "columns": {"rows": 5, "columns": 9, "axis": 1},
    "heads": {"rows": 12, "columns": 7, "unit_size": 2},
    "head columns": {"rows": 7, "columns": 12, "axis": 1, "unit_size": 2, "bias": True},
    "bias": {"rows": 9, "columns": 5, "bias": True},
    "fused part": {"rows": 19, "columns": 5, "unit_size": 2, "offset": 5, "bias": True},
    "fused by head": {"rows": 34, "columns": 5, "unit_size": 2, "offset": 4, "stride": 6}
    | {"bias": True},
    "transposed": {"rows": 5, "columns": 9, "axis": 1, "bias": True, "transposed": True},
    "transposed inputs": {"rows": 9, "columns": 5, "bias": True, "transposed": True},
}
all_sites = pytest.mark.parametrize("kind", SITES)


def site_of(kind: str, dtype=torch.float64):
    return linear_site(**SITES[kind], dtype=dtype)


SELECTED = selection([1, 4], [0, 3])


def random_operator(site) -> ExpansionOperator:
    """An operator whose factors are both random, not yet folded in."""
    size = 2 * site.group.unit_size
    p, q = {2: (1, 2), 4: (2, 2)}[size]
    factors = MonarchFactors(
        torch.randn(q, p, p, dtype=site.weight.dtype), torch.randn(p, q, q, dtype=site.weight.dtype)
    )
    return ExpansionOperator(site, SELECTED, factors)


def effective(operator, weight, bias, left, right):
    """Effective weight and bias by dense algebra, differentiable in all."""
    dense = dense_operator(left, right)
    positive, negative = operator.advantageous, operator.disadvantageous
    rows = weight.t() if operator.site.axis == 1 else weight
    rows = rows.index_add(0, negative, dense @ rows[positive])
    weight = rows.t() if operator.site.axis == 1 else rows
    if bias is not None and len(operator.site.parameters()) == 2:
        bias = bias.index_add(0, negative, dense @ bias[positive])
    return weight, bias


def test_indices_are_those_of_the_sites_units():
    operator = random_operator(site_of("fused part"))
    assert operator.advantageous.tolist() == [7, 8, 13, 14]
    assert operator.disadvantageous.tolist() == [5, 6, 11, 12]


@all_sites
def test_a_fresh_operator_is_zero_and_folded(kind):
    site = site_of(kind)
    before = [parameter.clone() for parameter in site.parameters()]
    operator = ExpansionOperator(site, SELECTED, seed=3, stage=1)
    assert operator.folded
    assert torch.count_nonzero(to_dense(operator.factors)) == 0
    operator.unfold()
    operator.fold()
    for parameter, copy in zip(site.parameters(), before, strict=True):
        assert torch.equal(parameter, copy)


def test_fresh_factors_depend_on_seed_stage_and_site():
    def draw(seed, stage, name, dtype=torch.float64):
        site = linear_site(9, 5, name=name, dtype=dtype)
        return ExpansionOperator(site, SELECTED, seed=seed, stage=stage).factors.right

    assert torch.equal(draw(1, 0, "a"), draw(1, 0, "a"))
    drawn = [draw(1, 0, "a"), draw(2, 0, "a"), draw(1, 1, "a"), draw(1, 0, "b")]
    assert len({tuple(right.flatten().tolist()) for right in drawn}) == 4
    assert torch.equal(draw(1, 0, "a", torch.float32).double(), drawn[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_given_factors_take_the_weights_dtype(dtype):
    given = MonarchFactors(torch.ones(2, 1, 1), torch.ones(1, 2, 2))
    operator = ExpansionOperator(site_of("rows", dtype), SELECTED, given)
    assert operator.factors.left.dtype == operator.factors.right.dtype == dtype


def test_given_factors_are_copied():
    given = MonarchFactors(torch.ones(2, 1, 1).double(), torch.ones(1, 2, 2).double())
    operator = ExpansionOperator(site_of("rows"), SELECTED, given)
    for factor in operator.factors:
        factor.add_(1)
    assert given.left.eq(1).all() and given.right.eq(1).all()


@all_sites
def test_fold_writes_effective_weight_and_bias(kind):
    site = site_of(kind)
    operator, module = random_operator(site), site.module
    bias = None if module.bias is None else module.bias.detach().clone()
    weight = module.weight.detach().clone()
    expected, expected_bias = effective(operator, weight, bias, *operator.factors)
    parameters = site.parameters()
    operator.fold()
    assert operator.folded
    torch.testing.assert_close(module.weight.detach(), expected)
    if bias is not None:
        torch.testing.assert_close(module.bias.detach(), expected_bias)
        assert torch.equal(module.bias, bias) == (len(parameters) == 1)
    assert all(a is b for a, b in zip(site.parameters(), parameters, strict=True))
    operator.unfold()
    assert not operator.folded
    torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-12, atol=1e-12)


@all_sites
def test_folding_leaves_requires_grad_and_the_graph_alone(kind):
    site = site_of(kind)
    operator = random_operator(site)
    operator.fold()
    for parameter in site.parameters():
        assert parameter.requires_grad and parameter.is_leaf and parameter.grad_fn is None
    assert not operator.factors.left.requires_grad


@all_sites
def test_mapped_gradients_equal_autograd(kind):
    site = site_of(kind)
    operator, module = random_operator(site), site.module
    transposed = site.transposed
    inputs = torch.randn(6, module.weight.shape[int(not transposed)], dtype=torch.float64)
    bias = None if module.bias is None else module.bias.detach().clone().requires_grad_()
    weight = module.weight.detach().clone().requires_grad_()
    factors = [factor.clone().requires_grad_() for factor in operator.factors]
    matrix, added = effective(operator, weight, bias, *factors)
    matrix = matrix.t() if transposed else matrix
    output = torch.nn.functional.linear(inputs, matrix, added)
    output.pow(3).sum().backward()

    operator.fold()
    module(inputs).pow(3).sum().backward()
    operator.map_gradient()
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(module.weight.grad, weight.grad, **tolerance)
    if bias is not None:
        torch.testing.assert_close(module.bias.grad, bias.grad, **tolerance)
    for own, factor in zip(operator.factors, factors, strict=True):
        torch.testing.assert_close(own.grad, factor.grad, **tolerance)


def test_a_weight_without_a_gradient_gives_its_operator_none():
    site = site_of("bias")
    operator = random_operator(site)
    operator.factors.left.grad = torch.ones_like(operator.factors.left)  # of the step before
    operator.map_gradient()
    assert operator.factors.left.grad is None and operator.factors.right.grad is None


def test_a_frozen_bias_is_folded_but_gives_no_gradient():
    site = site_of("bias")
    site.module.bias.requires_grad_(False)
    operator = random_operator(site)
    site.module(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    gradient = site.weight.grad.clone()
    operator.map_gradient()
    with_bias = operator.factors.left.grad
    plain = random_operator(linear_site(9, 5))
    plain.factors = operator.factors
    plain.site.module.weight = torch.nn.Parameter(site.weight.detach().clone())
    plain.site.weight.grad = gradient
    plain.map_gradient()
    assert torch.equal(plain.factors.left.grad, with_bias)


@all_sites
def test_relative_norm(kind):
    site = site_of(kind)
    operator = random_operator(site)
    operator.fold()
    weight = site.weight.detach() if site.axis == 0 else site.weight.detach().t()
    update = to_dense(operator.factors) @ weight[operator.advantageous]
    expected = update.norm() / weight[operator.disadvantageous].norm()
    torch.testing.assert_close(operator.relative_norm(), expected)


def test_relative_norm_of_empty_rows_is_finite():
    site = site_of("rows")
    torch.nn.init.zeros_(site.weight)
    assert ExpansionOperator(site, SELECTED).relative_norm() == 0
