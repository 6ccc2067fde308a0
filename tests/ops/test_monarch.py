"""Monarch factors against T = Pm L Pm^T R written out with permutation matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense_operator

from apex_composer.ops.monarch import (
    MonarchFactors,
    factor_pair,
    has_factor_pair,
    init_factors,
    multiply,
    multiply_left,
    multiply_right,
    to_dense,
)

PAIRS = [(1, 1), (1, 3), (2, 2), (2, 3), (3, 2), (5, 7), (4, 16)]


def random_factors(p: int, q: int, dtype: torch.dtype = torch.float64) -> MonarchFactors:
    """Both factors random, unlike `init_factors`."""
    return MonarchFactors(torch.randn(q, p, p, dtype=dtype), torch.randn(p, q, q, dtype=dtype))


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_the_oracle_has_the_entries_of_the_two_block_products(p, q):
    """T[(k, j), (i, m)] = L[j][k, i] R[i][j, m], from Z[i] = R[i] X[i] and Y[j] = L[j] Z[:, j]."""
    left, right = random_factors(p, q)
    dense = dense_operator(left, right)
    for k in range(p):
        for j in range(q):
            for i in range(p):
                expected = left[j, k, i] * right[i, j]
                torch.testing.assert_close(dense[k * q + j, i * q : (i + 1) * q], expected)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_multiply_equals_the_dense_product(p, q, columns):
    factors = random_factors(p, q)
    dense = dense_operator(*factors)
    matrix = torch.randn(p * q, columns, dtype=torch.float64)
    torch.testing.assert_close(multiply(factors, matrix), dense @ matrix)
    torch.testing.assert_close(to_dense(factors), dense)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_the_two_products_are_the_block_diagonal_factors(p, q):
    factors = random_factors(p, q)
    matrix = torch.randn(p * q, 4, dtype=torch.float64)
    middle = multiply_right(factors, matrix)
    assert middle.shape == (p, q, 4)
    torch.testing.assert_close(middle.flatten(0, 1), torch.block_diag(*factors.right) @ matrix)
    result = multiply_left(factors, middle)
    assert result.shape == (p * q, 4)
    # The blocks of L lie along the other axis of [p, q]: Pm swaps the two.
    swapped = torch.block_diag(*factors.left) @ middle.transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(result, swapped.unflatten(0, (q, p)).transpose(0, 1).flatten(0, 1))


def test_multiply_takes_a_transposed_view():
    factors = random_factors(3, 5)
    wide = torch.randn(4, 15, dtype=torch.float64)
    torch.testing.assert_close(multiply(factors, wide.t()), dense_operator(*factors) @ wide.t())


@pytest.mark.parametrize(("p", "q"), [(1, 1), (1, 3), (2, 3), (3, 3)])
def test_gradients_of_both_factors_and_the_matrix(p, q):
    left, right = random_factors(p, q)
    matrix = torch.randn(p * q, 2, dtype=torch.float64)
    for tensor in (left, right, matrix):
        tensor.requires_grad_()

    def product(left, right, matrix):
        return multiply(MonarchFactors(left, right), matrix)

    assert torch.autograd.gradcheck(product, (left, right, matrix))


@pytest.mark.parametrize(
    ("size", "pair"),
    [
        (704, (22, 32)),  # TinyLLaMA: 12.5 % of 5632 channels
        (1056, (32, 33)),  # 18.75 % of 5632 channels
        (256, (16, 16)),  # 4 heads of 64
        (512, (16, 32)),
        (64, (8, 8)),
        (12, (3, 4)),
        (4, (2, 2)),
        (3, (1, 3)),
        (1, (1, 1)),
    ],
)
def test_factor_pairs(size, pair):
    assert has_factor_pair(size)
    assert factor_pair(size) == pair


@given(st.integers(1, 20_000))
@settings(max_examples=200)
def test_a_factor_pair_is_the_nearest_to_the_root_or_refused(size):
    divisors = [p for p in range(1, math.isqrt(size) + 1) if size % p == 0]
    nearest = (divisors[-1], size // divisors[-1])
    if nearest[1] <= 4 * nearest[0]:
        assert factor_pair(size) == nearest
    else:
        assert not has_factor_pair(size)
        with pytest.raises(ValueError, match=f"^{size} rows have no factor pair"):
            factor_pair(size)


def test_a_refused_size_names_the_next_smaller_one_that_works():
    with pytest.raises(ValueError, match=r"172 rows .* \(nearest: 4 x 43\): use 171 rows instead"):
        factor_pair(172)


@pytest.mark.parametrize("size", [0, -4])
def test_a_size_below_one_is_refused(size):
    with pytest.raises(ValueError, match=f"at least 1 row, got {size}"):
        factor_pair(size)


def test_fresh_factors_make_the_zero_operator():
    factors = init_factors(704, generator=torch.Generator().manual_seed(1))
    assert factors.left.shape == (32, 22, 22) and factors.right.shape == (22, 32, 32)
    assert torch.count_nonzero(factors.left) == 0
    assert torch.count_nonzero(to_dense(factors)) == 0


@pytest.mark.parametrize("size", [1024, 1056])
def test_right_factor_has_mean_zero_and_variance_one_over_q(size):
    _, q = factor_pair(size)
    right = init_factors(size, generator=torch.Generator().manual_seed(1)).right
    # 32768 numbers and more: the estimates' standard errors are 0.4 % and 0.6 % of these scales.
    assert abs(right.mean()) < 0.02 / math.sqrt(q)
    assert right.var().item() == pytest.approx(1 / q, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_dtype_has_the_same_numbers(dtype):
    def draw(dtype):
        return init_factors(64, generator=torch.Generator().manual_seed(5), dtype=dtype)

    factors, single = draw(dtype), draw(torch.float32)
    assert factors.left.dtype == factors.right.dtype == dtype
    assert torch.equal(factors.right, single.right.to(dtype))


def test_a_generator_decides_the_numbers_and_the_global_one_is_left_alone():
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    first = init_factors(64, generator=generator).right
    second = init_factors(64, generator=generator).right
    again = init_factors(64, generator=torch.Generator().manual_seed(5)).right
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
