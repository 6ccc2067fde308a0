"""The hot functions against autograd through a dense T, and against loops."""

import pytest
import torch
from oracle import dense_operator

from apex_composer.ops import reference
from apex_composer.ops.monarch import MonarchFactors, multiply
from apex_composer.ops.packed_samples import find_samples
from apex_composer.ops.reference import (
    fold,
    map_gradient,
    product_gradients,
    take,
    unit_square_sums,
)

pytestmark = pytest.mark.numeric

NAN = float("nan")
# p, q, length of the other axis, spare indices that are in neither set
SIZES = [(1, 1, 1, 0), (1, 3, 5, 2), (2, 3, 1, 5), (3, 2, 7, 1), (3, 5, 11, 13)]
both_axes = pytest.mark.parametrize("axis", [0, 1])
all_sizes = pytest.mark.parametrize("size", SIZES, ids=str)


class Case:
    """A weight, its index sets in mixed order, and random factors."""

    def __init__(self, size: tuple, axis: int, dtype: torch.dtype = torch.float64):
        p, q, other, spare = size
        n, self.axis = p * q, axis
        order = torch.randperm(2 * n + spare)
        self.positive, self.negative, self.spare = order[:n], order[n : 2 * n], order[2 * n :]
        shape = (len(order), other) if axis == 0 else (other, len(order))
        self.weight = torch.randn(shape, dtype=dtype)
        self.factors = MonarchFactors(
            torch.randn(q, p, p, dtype=dtype), torch.randn(p, q, q, dtype=dtype)
        )

    @property
    def sets(self) -> tuple:
        return self.positive, self.negative

    def effective(self, weight, left, right):
        """W_eff by dense algebra, differentiable in all three."""
        rows = self.rows(weight)
        update = dense_operator(left, right) @ rows[self.positive]
        return self.rows(rows.index_add(0, self.negative, update))

    def rows(self, matrix):
        """The matrix with the expanded axis first (a view)."""
        return matrix if self.axis == 0 else matrix.t()


@both_axes
def test_take_reads_along_the_axis_and_puts_it_first(axis):
    matrix = torch.arange(12).reshape(3, 4)
    expected = [[8, 9, 10, 11], [0, 1, 2, 3]] if axis == 0 else [[2, 6, 10], [0, 4, 8]]
    assert take(matrix, torch.tensor([2, 0]), axis).tolist() == expected


@both_axes
@all_sizes
def test_fold_writes_the_effective_weight(size, axis):
    case = Case(size, axis)
    folded = case.weight.clone()
    fold(folded, case.factors, *case.sets, axis=axis)
    torch.testing.assert_close(folded, case.effective(case.weight, *case.factors))
    untouched = torch.cat([case.positive, case.spare])
    assert torch.equal(case.rows(folded)[untouched], case.rows(case.weight)[untouched])


@both_axes
@all_sizes
def test_a_negative_sign_takes_the_operator_out_again(size, axis):
    case = Case(size, axis)
    weight = case.weight.clone()
    fold(weight, case.factors, *case.sets, axis=axis)
    assert not torch.equal(weight, case.weight)
    fold(weight, case.factors, *case.sets, axis=axis, sign=-1)
    torch.testing.assert_close(weight, case.weight, rtol=1e-12, atol=1e-12)


@both_axes
def test_fold_does_not_read_other_rows(axis):
    case = Case((2, 3, 5, 4), axis)
    expected = case.effective(case.weight, *case.factors)
    poisoned = case.weight.clone()
    case.rows(poisoned)[case.spare] = NAN
    fold(poisoned, case.factors, *case.sets, axis=axis)
    assert case.rows(poisoned)[case.spare].isnan().all()
    torch.testing.assert_close(
        case.rows(poisoned)[case.negative], case.rows(expected)[case.negative]
    )
    assert torch.equal(case.rows(poisoned)[case.positive], case.rows(case.weight)[case.positive])


@both_axes
def test_fold_writes_through_a_view(axis):
    case = Case((2, 3, 5, 1), axis)
    storage = case.weight.t().contiguous()
    fold(storage.t(), case.factors, *case.sets, axis=axis)
    torch.testing.assert_close(storage.t(), case.effective(case.weight, *case.factors))


@both_axes
@all_sizes
def test_mapped_gradients_equal_autograd_through_the_effective_weight(size, axis):
    case = Case(size, axis)
    leaves = [t.clone().requires_grad_() for t in (case.weight, *case.factors)]
    effective = case.effective(*leaves)
    target = torch.randn_like(case.weight)
    (effective - target).pow(3).sum().backward()

    gradient = 3 * (effective.detach() - target).square()
    before = gradient.clone()
    mapped = map_gradient(effective.detach(), gradient, case.factors, *case.sets, axis=axis)
    for found, leaf in zip((gradient, *mapped), leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-10)
    untouched = torch.cat([case.negative, case.spare])
    assert torch.equal(case.rows(gradient)[untouched], case.rows(before)[untouched])


@both_axes
def test_map_gradient_reads_the_advantageous_rows_only(axis):
    case = Case((2, 3, 5, 4), axis)
    gradient = torch.randn_like(case.weight)
    clean = gradient.clone()
    expected = map_gradient(case.weight, clean, case.factors, *case.sets, axis=axis)

    poisoned = case.weight.clone()
    case.rows(poisoned)[torch.cat([case.negative, case.spare])] = NAN
    case.rows(gradient)[case.spare] = NAN
    found = map_gradient(poisoned, gradient, case.factors, *case.sets, axis=axis)
    assert torch.equal(found.left, expected.left) and torch.equal(found.right, expected.right)
    read = torch.cat(case.sets)
    assert torch.equal(case.rows(gradient)[read], case.rows(clean)[read])
    assert case.rows(gradient)[case.spare].isnan().all()


@both_axes
def test_map_gradient_leaves_the_weight_and_the_factors_alone(axis):
    case = Case((2, 3, 5, 4), axis)
    before = [t.clone() for t in (case.weight, *case.factors)]
    map_gradient(case.weight, torch.ones_like(case.weight), case.factors, *case.sets, axis=axis)
    for tensor, copy in zip((case.weight, *case.factors), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("shape", [(1, 2, 3, 5), (3, 2, 2, 7), (2, 3, 5, 1), (2, 2, 3, 0)])
def test_several_operators_at_once_compute_what_each_does_by_itself(shape):
    m, p, q, d = shape
    factors = MonarchFactors(
        torch.randn(m, q, p, p, dtype=torch.float64), torch.randn(m, p, q, q, dtype=torch.float64)
    )
    selected, received = torch.randn(2, m, p * q, d, dtype=torch.float64)
    found = multiply(factors, selected), *flat(product_gradients(factors, selected, received))
    assert found[0].shape == found[3].shape == selected.shape
    for i in range(m):
        own = MonarchFactors(*(factor[i] for factor in factors))
        gradients = product_gradients(own, selected[i], received[i])
        for several, one in zip(found, (multiply(own, selected[i]), *flat(gradients)), strict=True):
            torch.testing.assert_close(several[i], one)


def flat(gradients: tuple) -> tuple:
    return *gradients[0], gradients[1]


@both_axes
def test_float32_is_within_rounding_of_float64(axis):
    case = Case((8, 11, 64, 40), axis, torch.float64)
    gradient = torch.randn_like(case.weight)
    single = MonarchFactors(*(f.float() for f in case.factors))
    results = {}
    for dtype, factors in ((torch.float64, case.factors), (torch.float32, single)):
        weight, mapped = case.weight.to(dtype, copy=True), gradient.to(dtype, copy=True)
        parts = map_gradient(weight, mapped, factors, *case.sets, axis=axis)
        fold(weight, factors, *case.sets, axis=axis)
        results[dtype] = (weight, mapped, *parts)
    for exact, rounded in zip(results[torch.float64], results[torch.float32], strict=True):
        assert rounded.dtype == torch.float32
        # Products of 8, 11 and 64 numbers: each sum rounds to 6e-8, and they add up as their root.
        assert (rounded - exact).norm() <= 1e-6 * exact.norm()


def slow_square_sums(activation, unit_size: int, mask=None) -> torch.Tensor:
    """[samples, units] by loops over every single number."""
    samples, tokens, width = activation.shape
    sums = torch.zeros(samples, width // unit_size, dtype=torch.float64)
    for sample in range(samples):
        for token in range(tokens):
            if mask is None or mask[sample, token]:
                for index in range(width):
                    sums[sample, index // unit_size] += (
                        activation[sample, token, index].double() ** 2
                    )
    return sums


RAGGED = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("mask", [None, RAGGED], ids=["whole", "padded"])
@pytest.mark.parametrize("unit_size", [1, 2, 3, 6])
def test_square_sums_equal_loops(unit_size, mask):
    activation = torch.randn(3, 5, 6)
    found = unit_square_sums(activation, unit_size, mask)
    expected = slow_square_sums(activation, unit_size, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_may_have_any_dtype(dtype):
    activation = torch.randn(3, 5, 6)
    expected = unit_square_sums(activation, 2, RAGGED)
    assert torch.equal(unit_square_sums(activation, 2, RAGGED.to(dtype)), expected)


@pytest.mark.parametrize("unit_size", [1, 3])
def test_square_sums_without_padding_equal_those_with_it(unit_size):
    """Models that drop padding before the projection hand over [kept tokens, width]."""
    activation = torch.randn(3, 5, 6)
    found = unit_square_sums(activation[RAGGED], unit_size, RAGGED)
    torch.testing.assert_close(found, unit_square_sums(activation, unit_size, RAGGED))


@pytest.mark.parametrize("unpadded", [False, True])
def test_bfloat16_activations_are_summed_in_float32(unpadded):
    """300 ones: a bfloat16 sum of squares would stop at 256."""
    activation = torch.ones(2, 300, 4, dtype=torch.bfloat16)
    mask = torch.ones(2, 300, dtype=torch.bool)
    if unpadded:
        activation = activation.flatten(0, 1)
    sums = unit_square_sums(activation, 2, mask)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, torch.full((2, 2), 600.0))


def test_float64_activations_are_summed_in_float64():
    activation = torch.randn(2, 5, 4, dtype=torch.float64)
    sums = unit_square_sums(activation, 2)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, slow_square_sums(activation, 2), rtol=1e-14, atol=0)


def test_square_sums_carry_no_gradient_and_leave_the_activation_alone():
    activation = torch.randn(2, 5, 4, requires_grad=True)
    before = activation.detach().clone()
    assert not unit_square_sums(activation, 2, RAGGED[:2]).requires_grad
    assert torch.equal(activation, before)


@pytest.mark.parametrize(
    ("mask", "told"), [(None, "none"), (RAGGED, "8 tokens"), (RAGGED[:2], "8 tokens")]
)
def test_activations_without_a_sample_axis_need_a_mask_that_fits(mask, told):
    with pytest.raises(ValueError, match=rf"shape \(9, 4\).*{told}.*use_pad_tok_in_ffn: true"):
        unit_square_sums(torch.randn(9, 4), 1, mask)


@pytest.mark.parametrize("unit_size", [1, 3])
def test_values_at_padded_places_do_not_matter(unit_size):
    """Nothing promises that a model computes finite numbers where there is only padding."""
    activation = torch.randn(3, 5, 6)
    expected = unit_square_sums(activation, unit_size, RAGGED)
    activation[~RAGGED] = float("inf")
    assert torch.equal(unit_square_sums(activation, unit_size, RAGGED), expected)


@pytest.mark.parametrize("unit_size", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("unpadded", [False, True])
def test_packed_sums_are_those_of_every_sequence_by_itself(unpadded, dtype, unit_size, monkeypatch):
    monkeypatch.setattr(reference, "_COLUMNS_AT_ONCE", 8)  # two blocks of columns
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, -1, -1], [-1] * 6, [0, 0, 0, 1, 1, 1]])
    mask = torch.ones_like(ids)
    mask[3, 4] = 0
    values = torch.randn(4, 6, 12, dtype=torch.float64).to(dtype)
    values[1, 5] = NAN  # padding is not looked at
    samples = find_samples(ids, mask)
    given = values[samples.counted] if unpadded else values
    found = reference.packed_square_sums(given, unit_size, samples)
    expected = [
        reference.unit_square_sums(values[row][own].unsqueeze(0), unit_size)[0]
        for row, sequence in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (3, 0), (3, 1))
        for own in [(ids[row] == sequence) & (mask[row] == 1)]
    ]
    torch.testing.assert_close(found[samples.valid], torch.stack(expected))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found[~samples.valid].count_nonzero() == 0


def test_ids_of_other_tokens_are_refused():
    samples = find_samples(torch.tensor([[0, 1, 1, -1]]))
    for shape in ((2, 2, 3), (4, 3)):
        with pytest.raises(ValueError, match="the sequence ids are for .* the activation has"):
            reference.packed_square_sums(torch.ones(shape), 1, samples)
