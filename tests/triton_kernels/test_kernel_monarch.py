"""Fold and gradient map of many matrices against the float64 reference."""

import pytest
import torch
from kernel_cases import MonarchCase, relative_error

from apex_composer.triton_kernels import MonarchBatch

both_axes = pytest.mark.parametrize("axis", [0, 1])
# p, q: 704, 1056 and 1376 channels, 256 and 64 rows of heads, odd ones, lopsided ones, width 1
SIZES = [
    (22, 32, 20),
    (16, 16, 37),
    (32, 33, 16),
    (32, 43, 9),
    (8, 8, 70),
    (3, 5, 131),
    (1, 3, 1),
    (2, 70, 5),
    (65, 66, 3),
]
all_sizes = pytest.mark.parametrize(("p", "q", "width"), SIZES, ids=str)
TOLERANCE = 5e-7  # float32's rounding is 6e-8; torch's own float32 error here is about 1e-7


@both_axes
@all_sizes
def test_fold_equals_the_reference(p, q, width, axis, device):
    case = MonarchCase(p, q, width, axis, device, matrices=1 if p * q > 300 else 2)
    before = case.copy(case.weights)
    expected = [case.folded(place) for place in range(len(before))]
    case.batch().fold()
    for place, (found, exact) in enumerate(zip(case.weights, expected, strict=True)):
        rows = case.without_spare(found, place)
        assert relative_error(rows, case.without_spare(exact, place)) < TOLERANCE
        kept, kept_before = (case.rows(m)[case.advantageous[place]] for m in (found, before[place]))
        assert torch.equal(kept, kept_before)
        assert case.rows(found)[case.spare[place]].isnan().all()


@both_axes
@all_sizes
def test_mapped_gradients_equal_the_reference(p, q, width, axis, device):
    case = MonarchCase(p, q, width, axis, device, matrices=1 if p * q > 300 else 2)
    before = case.copy(case.gradients)
    weights = case.copy(case.weights)
    lefts, rights = case.batch().map_gradient(case.gradients)
    for place, gradient in enumerate(before):
        exact, factors = case.mapped(place, gradient)
        found = case.without_spare(case.gradients[place], place)
        assert relative_error(found, case.without_spare(exact, place)) < TOLERANCE
        assert relative_error(lefts[place], factors.left) < TOLERANCE
        assert relative_error(rights[place], factors.right) < TOLERANCE
        read = case.disadvantageous[place]
        assert torch.equal(case.rows(case.gradients[place])[read], case.rows(gradient)[read])
        assert case.rows(case.gradients[place])[case.spare[place]].isnan().all()
        torch.testing.assert_close(case.weights[place], weights[place], equal_nan=True)


@both_axes
def test_a_second_run_gives_the_same_bits(axis, device):
    case = MonarchCase(2, 4, 150, axis, device)
    weights, gradients = case.copy(case.weights), case.copy(case.gradients)
    results = []
    for _ in range(2):
        for own, start in ((case.weights, weights), (case.gradients, gradients)):
            for tensor, values in zip(own, start, strict=True):
                tensor.copy_(values)
        batch = case.batch()
        batch.fold()
        mapped = batch.map_gradient(case.gradients)
        results.append(
            [t.clone() for t in (*case.weights, *case.gradients, *mapped[0], *mapped[1])]
        )
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num())


@both_axes
def test_unfolding_subtracts_the_very_bits_that_folding_added(axis, device):
    case = MonarchCase(2, 4, 20, axis, device)
    base = case.copy(case.weights)
    for place, weight in enumerate(case.weights):
        case.rows(weight)[case.disadvantageous[place]] = 0
    batch = case.batch()
    batch.fold()
    added = case.copy(case.weights)  # N rows alone: 0 + T W[P]
    for place, weight in enumerate(case.weights):
        weight.copy_(base[place])
    batch.fold()
    folded = case.copy(case.weights)
    batch.fold(-1)
    for place, chosen in enumerate(case.disadvantageous):
        delta, start, middle, end = (
            case.rows(own[place])[chosen] for own in (added, base, folded, case.weights)
        )
        assert torch.equal(middle, start + delta)
        assert torch.equal(end, middle - delta)


@both_axes
def test_zero_factors_change_no_bit(axis, device):
    case = MonarchCase(8, 8, 20, axis, device)
    for left in case.lefts:
        left.zero_()
    before = case.copy(case.weights)
    case.batch().fold()
    for found, start in zip(case.weights, before, strict=True):
        assert torch.equal(found.nan_to_num(), start.nan_to_num())


@both_axes
def test_matrices_may_be_taken_in_turns(axis, device):
    case = MonarchCase(2, 3, 70, axis, device, matrices=3)
    weights, gradients = case.copy(case.weights), case.copy(case.gradients)
    case.batch().fold()
    expected = [t.clone() for own in case.batch().map_gradient(case.gradients) for t in own]
    at_once = case.copy(case.weights), case.copy(case.gradients)
    for own, start in ((case.weights, weights), (case.gradients, gradients)):
        for tensor, values in zip(own, start, strict=True):
            tensor.copy_(values)
    in_turns = case.batch(scratch_bytes=2 * (6 * 80 * 4) * (1 + axis))
    in_turns.fold()
    found = [t for own in in_turns.map_gradient(case.gradients) for t in own]
    for own, values in zip((case.weights, case.gradients), at_once, strict=True):
        for tensor, other in zip(own, values, strict=True):
            assert torch.equal(tensor.nan_to_num(), other.nan_to_num())
    for one, other in zip(found, expected, strict=True):  # fewer programs, so other partial sums
        assert relative_error(one, other.double()) < TOLERANCE


@both_axes
def test_addresses_that_are_not_aligned_give_the_same_bits(axis, device):
    case = MonarchCase(2, 4, 32, axis, device)
    case.batch().fold()
    expected = case.copy(case.weights)
    case.batch().fold(-1)
    start = case.copy(case.weights)
    for place, weight in enumerate(case.weights):
        shifted = torch.empty(weight.numel() + 1, device=device)[1:].view(weight.shape)
        case.weights[place] = shifted.copy_(start[place])
    case.batch().fold()
    for found, aligned in zip(case.weights, expected, strict=True):
        assert relative_error(found.nan_to_num(), aligned.nan_to_num().double()) < TOLERANCE


def test_the_transpose_of_a_matrix_is_a_matrix(device):
    case = MonarchCase(2, 4, 40, 0, device)
    expected = [case.folded(place) for place in range(2)]
    case.weights = [w.t().contiguous().t() for w in case.weights]
    case.batch().fold()
    for place, (found, exact) in enumerate(zip(case.weights, expected, strict=True)):
        found, exact = (case.without_spare(m, place) for m in (found, exact))
        assert relative_error(found, exact) < TOLERANCE


def test_parts_of_one_weight_may_share_a_batch(device):
    """Keys and values of a fused projection: one tensor, disjoint rows."""
    case = MonarchCase(2, 4, 20, 0, device)
    fused = torch.cat(case.weights).nan_to_num()
    rows = len(case.weights[0])
    exact = torch.cat([case.folded(place) for place in range(2)]).nan_to_num()
    sets = [[case.sets(place)[i] + place * rows for place in range(2)] for i in range(2)]
    MonarchBatch([fused, fused], case.lefts, case.rights, *sets, axis=0).fold()
    assert relative_error(fused, exact) < TOLERANCE


def test_gradients_may_lie_elsewhere_at_every_step(device):
    case = MonarchCase(2, 4, 40, 1, device)
    batch = case.batch()
    for _ in range(3):
        gradients = [torch.randn_like(w) for w in case.weights]
        exact = [case.mapped(place, g) for place, g in enumerate(gradients)]
        lefts, _ = batch.map_gradient(gradients)
        for place, (mapped, factors) in enumerate(exact):
            found, wanted = (case.without_spare(m, place) for m in (gradients[place], mapped))
            assert relative_error(found, wanted) < TOLERANCE
            assert relative_error(lefts[place], factors.left) < TOLERANCE


def test_weights_may_move(device):
    """FSDP and load_state_dict(assign=True) give a parameter new memory."""
    case = MonarchCase(2, 4, 40, 0, device)
    parameters = [torch.nn.Parameter(w) for w in case.weights]
    case.weights = parameters
    expected = [case.folded(place).detach() for place in range(2)]
    batch = case.batch()
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    batch.fold()
    for place, (found, exact) in enumerate(zip(parameters, expected, strict=True)):
        found, exact = (case.without_spare(m.detach(), place) for m in (found, exact))
        assert relative_error(found, exact) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda w: w.double(), "dtype"),
        (lambda w: w.bfloat16(), "dtype"),
        (lambda w: w.t().contiguous().t(), "stride"),
        (lambda w: w[:-1].clone(), "shape"),
    ],
    ids=["float64", "bfloat16", "transposed", "shorter"],
)
def test_weights_that_move_and_change_are_refused(device, change, what):
    """`model.to(dtype)` and `parameter.data = ...`: the kernels would read other numbers."""
    case = MonarchCase(2, 4, 40, 0, device)
    case.weights = [torch.nn.Parameter(w) for w in case.weights]
    batch = case.batch()
    case.weights[1].data = change(case.weights[1].data)
    before = case.weights[1].detach().clone()
    for _ in range(2):  # an error is not forgotten
        with pytest.raises(ValueError, match=rf"weights\[1\] has {what} .* now and had"):
            batch.fold()
        for gradients in (case.gradients, [None, case.gradients[1]]):
            with pytest.raises(ValueError, match=rf"weights\[1\] has {what} .* now and had"):
                batch.map_gradient(gradients)
    assert torch.equal(case.weights[1].nan_to_num(), before.nan_to_num())


def test_gradients_are_compared_with_the_weights_as_they_were_at_first(device):
    case = MonarchCase(2, 4, 40, 0, device)
    batch = case.batch()
    for i, weight in enumerate(case.weights):
        weight.data = weight.data.t().contiguous().t()
        case.gradients[i] = case.gradients[i].t().contiguous().t()
    with pytest.raises(ValueError, match=r"gradients\[0\] has stride"):
        batch.map_gradient(case.gradients)


def test_weights_without_a_gradient_leave_their_factors_without_one(device):
    case = MonarchCase(2, 4, 20, 0, device, matrices=3)
    exact, factors = case.mapped(1, case.gradients[1])
    batch = case.batch()
    for _ in range(2):
        gradients = [None, case.gradients[1].clone(), None]
        lefts, rights = batch.map_gradient(gradients)
        assert lefts[0] is rights[0] is lefts[2] is rights[2] is None
        assert relative_error(lefts[1], factors.left) < TOLERANCE
        assert relative_error(rights[1], factors.right) < TOLERANCE
        found, wanted = (case.without_spare(m, 1) for m in (gradients[1], exact))
        assert relative_error(found, wanted) < TOLERANCE
    assert batch.map_gradient([None] * 3) == ([None] * 3, [None] * 3)


def test_autograd_notices_the_writes(device):
    case = MonarchCase(2, 3, 8, 0, device)
    weight = case.weights[0] = case.weights[0].nan_to_num().requires_grad_()
    batch = case.batch()
    loss = weight.square().sum()
    batch.fold()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    version = case.gradients[0]._version
    batch.map_gradient(case.gradients)
    assert case.gradients[0]._version == version + 1
    assert case.lefts[0]._version == 0


def test_ieee_products_are_at_hand(device):
    case = MonarchCase(2, 4, 40, 0, device)
    expected = [case.folded(place) for place in range(2)]
    case.batch(input_precision="ieee").fold()
    for place, (found, exact) in enumerate(zip(case.weights, expected, strict=True)):
        found, exact = (case.without_spare(m, place) for m in (found, exact))
        assert relative_error(found, exact) < TOLERANCE


@pytest.mark.gpu
@both_axes
@pytest.mark.parametrize(
    "size", [(22, 32, 2048), (32, 43, 4096), (16, 16, 2048), (40, 80, 2048)], ids=str
)
def test_real_sizes_keep_float32_accuracy_and_bits(size, axis):
    case = MonarchCase(*size, axis, torch.device("cuda"), matrices=4)
    before = case.copy(case.gradients)
    expected = [case.folded(place) for place in range(4)]
    mapped = [case.mapped(place, gradient) for place, gradient in enumerate(before)]
    batch = case.batch()
    batch.map_gradient(before)  # compiles and fills the allocators' caches
    first = [t.clone() for own in batch.map_gradient(case.copy(case.gradients)) for t in own]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [t for own in batch.map_gradient(case.gradients) for t in own]
        batch.fold()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
    for place in range(4):
        pairs = [(case.weights[place], expected[place]), (case.gradients[place], mapped[place][0])]
        for values, exact in pairs:
            values, exact = (case.without_spare(m, place) for m in (values, exact))
            assert relative_error(values, exact) < TOLERANCE
        assert relative_error(found[place], mapped[place][1].left) < 2 * TOLERANCE
        assert relative_error(found[4 + place], mapped[place][1].right) < 2 * TOLERANCE
