"""Fold and gradient map of many matrices against the float64 reference."""

import pytest
import torch
from kernel_cases import (
    check_error,
    chosen_error,
    copies,
    folded,
    mapped,
    odd_shape,
    on_gpus,
    relative_error,
    restore,
    same_bits,
    small_case,
)
from monarch_case import LLAMA_2_7B, TINYLLAMA, MonarchCase, Shape

from apex_composer.triton_kernels import MonarchBatch
from apex_composer.triton_kernels.availability import interpreted

pytestmark = pytest.mark.usefixtures("poisoned_memory")
both_axes = pytest.mark.parametrize("axis", [0, 1])


def odd_shapes(sizes: list[tuple[int, int, int]]) -> list[Shape]:
    """Both axes of each p, q, width; one matrix where the interpreter would take long for two."""
    return [odd_shape(*size, axis, 1 if size[0] > 9 else 2) for size in sizes for axis in (0, 1)]


# Blocks that fill no tile, width 1, and one side in steps (blocks above 64).
SMALL = odd_shapes([(22, 33, 20), (8, 8, 70), (3, 5, 131), (1, 3, 1), (2, 70, 5), (70, 2, 5)])
LARGE = [*TINYLLAMA, *LLAMA_2_7B, *odd_shapes([(22, 32, 2047), (32, 33, 17), (66, 80, 300)])]
small_and_large = pytest.mark.parametrize(
    "shape", [*odd_shapes([(2, 4, 20)]), *on_gpus(LARGE)], ids=str
)
every_shape = pytest.mark.parametrize(
    ("shape", "precision"),
    [
        *((shape, "tf32x3") for shape in SMALL),
        (SMALL[4], "ieee"),
        *on_gpus([(shape, "tf32x3") for shape in LARGE] + [(shape, "ieee") for shape in TINYLLAMA]),
    ],
    ids=str,
)

# Of values, and of dL and dR, which are sums over the width. Matrix units (tf32x3) cut off where
# float32 would round, so that long sums lose more. Products in plain tf32 would show as 4e-4.
COMPILED = {"tf32x3": (1e-6, 1e-5), "ieee": (1e-6, 3e-6)}
# float32's rounding is 6e-8; torch's own float32 error here is about 1e-7.
INTERPRETED = 5e-7
TOLERANCE = INTERPRETED if interpreted() else COMPILED["tf32x3"][1]  # of small cases


def check_all(found, torchs, exact, precision: str, *, factors: bool) -> None:
    """The kernels may err by their bound, or by 4 times torch's error; torch as float32 does."""
    torchs_error = relative_error(torchs, exact)
    assert torchs_error <= COMPILED["ieee"][factors]  # else TF32 has got into the reference
    bound = INTERPRETED if interpreted() else COMPILED[precision][factors]
    check_error(found, exact, max(bound, 4 * torchs_error))


@every_shape
def test_fold_equals_the_reference(shape, precision, device):
    case = MonarchCase(shape, device, mixed=True)
    before = copies(case.weights)
    case.batch(input_precision=precision).fold()
    for place, (found, start) in enumerate(zip(case.weights, before, strict=True)):
        exact, by_torch = start.double(), start.clone()
        case.fold(place, exact)
        case.fold(place, by_torch)
        written = case.disadvantageous[place]
        triple = (case.rows(matrix)[written] for matrix in (found, by_torch, exact))
        check_all(*triple, precision, factors=False)
        kept = torch.cat([case.advantageous[place], case.spare[place]])
        assert same_bits(case.rows(found)[kept], case.rows(start)[kept])


@every_shape
def test_mapped_gradients_equal_the_reference(shape, precision, device):
    case = MonarchCase(shape, device, mixed=True)
    before, weights = copies(case.gradients), copies(case.weights)
    lefts, rights = case.batch(input_precision=precision).map_gradient(case.gradients)
    for place, start in enumerate(before):
        exact, by_torch, weight = start.double(), start.clone(), weights[place]
        wanted = case.map_gradient(place, weight.double(), exact)
        torchs = case.map_gradient(place, weight, by_torch)
        for triple in zip((lefts[place], rights[place]), torchs, wanted, strict=True):
            check_all(*triple, precision, factors=True)
        matrices, written = (case.gradients[place], by_torch, exact), case.advantageous[place]
        check_all(*(case.rows(m)[written] for m in matrices), precision, factors=False)
        kept = torch.cat([case.disadvantageous[place], case.spare[place]])
        assert same_bits(case.rows(case.gradients[place])[kept], case.rows(start)[kept])
        assert same_bits(case.weights[place], weight)


@small_and_large
def test_a_second_run_gives_the_same_bits_and_nothing_waits(shape, device):
    case = MonarchCase(shape, device, mixed=True)
    weights, gradients, batch = copies(case.weights), copies(case.gradients), case.batch()
    results = []
    for mode in ("default", "error"):  # the first run compiles
        restore(case.weights, weights)
        restore(case.gradients, gradients)
        before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else None
        if before is not None:
            torch.cuda.set_sync_debug_mode(mode)
        try:
            factors = batch.map_gradient(case.gradients)
            batch.fold()
        finally:
            if before is not None:
                torch.cuda.set_sync_debug_mode(before)
        results.append(copies([*case.weights, *case.gradients, *factors[0], *factors[1]]))
    for first, second in zip(*results, strict=True):
        assert same_bits(first, second)


@small_and_large
def test_unfolding_subtracts_the_very_bits_that_folding_added(shape, device):
    case = MonarchCase(shape, device, mixed=True)
    base = copies(case.weights)
    for place, weight in enumerate(case.weights):
        case.rows(weight)[case.disadvantageous[place]] = 0
    batch = case.batch()
    batch.fold()
    added = copies(case.weights)  # N rows alone: 0 + T W[P]
    restore(case.weights, base)
    batch.fold()
    whole = copies(case.weights)
    batch.fold(-1)
    for place, chosen in enumerate(case.disadvantageous):
        delta, start, middle, end = (
            case.rows(own[place])[chosen] for own in (added, base, whole, case.weights)
        )
        assert torch.equal(middle, start + delta)
        assert torch.equal(end, middle - delta)


@both_axes
def test_zero_factors_change_no_bit(axis, device):
    case = small_case(8, 8, 20, axis, device)
    for left in case.lefts:
        left.zero_()
    before = copies(case.weights)
    case.batch().fold()
    for found, start in zip(case.weights, before, strict=True):
        assert same_bits(found, start)


@both_axes
def test_matrices_may_be_taken_in_turns(axis, device):
    case = small_case(2, 3, 20, axis, device, matrices=3)
    weights, gradients = copies(case.weights), copies(case.gradients)
    case.batch().fold()
    expected = [t.clone() for own in case.batch().map_gradient(case.gradients) for t in own]
    at_once = copies(case.weights), copies(case.gradients)
    restore(case.weights, weights)
    restore(case.gradients, gradients)
    in_turns = case.batch(scratch_bytes=2 * (6 * 32 * 4) * (1 + axis))
    in_turns.fold()
    found = [t for own in in_turns.map_gradient(case.gradients) for t in own]
    for own, values in zip((case.weights, case.gradients), at_once, strict=True):
        for tensor, other in zip(own, values, strict=True):
            assert same_bits(tensor, other)
    for one, other in zip(found, expected, strict=True):  # fewer programs, so other partial sums
        assert relative_error(one, other.double()) < TOLERANCE


@both_axes
def test_addresses_need_not_be_aligned(axis, device):
    case = small_case(2, 4, 32, axis, device)
    case.batch().fold()
    expected = copies(case.weights)
    case.batch().fold(-1)
    start = copies(case.weights)
    for place, weight in enumerate(case.weights):
        shifted = torch.empty(weight.numel() + 1, device=device)[1:].view(weight.shape)
        case.weights[place] = shifted.copy_(start[place])
    case.batch().fold()
    for found, aligned in zip(case.weights, expected, strict=True):
        assert relative_error(found.nan_to_num(), aligned.nan_to_num().double()) < TOLERANCE


def test_the_transpose_of_a_matrix_is_a_matrix(device):
    case = small_case(2, 4, 40, 0, device)
    expected = [folded(case, place) for place in range(2)]
    case.weights = [w.t().contiguous().t() for w in case.weights]
    case.batch().fold()
    for place, (found, exact) in enumerate(zip(case.weights, expected, strict=True)):
        assert chosen_error(case, place, found, exact) < TOLERANCE


def test_parts_of_one_weight_may_share_a_batch(device):
    """Keys and values of a fused projection: one tensor, disjoint rows."""
    case = small_case(2, 4, 20, 0, device)
    fused = torch.cat(case.weights).nan_to_num()
    rows = len(case.weights[0])
    exact = torch.cat([folded(case, place) for place in range(2)]).nan_to_num()
    sets = [[case.sets(place)[i] + place * rows for place in range(2)] for i in range(2)]
    MonarchBatch([fused, fused], case.lefts, case.rights, *sets, axis=0).fold()
    assert relative_error(fused, exact) < TOLERANCE


def test_gradients_may_lie_elsewhere_at_every_step(device):
    case = small_case(2, 4, 40, 1, device)
    batch = case.batch()
    for _ in range(3):
        gradients = [torch.randn_like(w) for w in case.weights]
        exact = [mapped(case, place, g) for place, g in enumerate(gradients)]
        lefts, _ = batch.map_gradient(gradients)
        for place, (wanted, factors) in enumerate(exact):
            assert chosen_error(case, place, gradients[place], wanted) < TOLERANCE
            assert relative_error(lefts[place], factors.left) < TOLERANCE


def test_weights_may_move(device):
    """FSDP and load_state_dict(assign=True) give a parameter new memory."""
    case = small_case(2, 4, 40, 0, device)
    parameters = [torch.nn.Parameter(w) for w in case.weights]
    case.weights = parameters
    expected = [folded(case, place).detach() for place in range(2)]
    batch = case.batch()
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    batch.fold()
    for place, (found, exact) in enumerate(zip(parameters, expected, strict=True)):
        assert chosen_error(case, place, found.detach(), exact) < TOLERANCE


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
    case = small_case(2, 4, 40, 0, device)
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
    assert same_bits(case.weights[1].detach(), before)


def test_gradients_are_compared_with_the_weights_as_they_were_at_first(device):
    case = small_case(2, 4, 40, 0, device)
    batch = case.batch()
    for i, weight in enumerate(case.weights):
        weight.data = weight.data.t().contiguous().t()
        case.gradients[i] = case.gradients[i].t().contiguous().t()
    with pytest.raises(ValueError, match=r"gradients\[0\] has stride"):
        batch.map_gradient(case.gradients)


def test_weights_without_a_gradient_leave_their_factors_without_one(device):
    case = small_case(2, 4, 20, 0, device, matrices=3)
    exact, factors = mapped(case, 1, case.gradients[1])
    batch = case.batch()
    for _ in range(2):
        gradients = [None, case.gradients[1].clone(), None]
        lefts, rights = batch.map_gradient(gradients)
        assert lefts[0] is rights[0] is lefts[2] is rights[2] is None
        assert relative_error(lefts[1], factors.left) < TOLERANCE
        assert relative_error(rights[1], factors.right) < TOLERANCE
        assert chosen_error(case, 1, gradients[1], exact) < TOLERANCE
    assert batch.map_gradient([None] * 3) == ([None] * 3, [None] * 3)


def test_autograd_notices_the_writes(device):
    case = small_case(2, 3, 8, 0, device)
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
