"""silu(gate) * up and its gradients against float64 and against eager mode."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import check_error, on_gpus, ragged_mask, relative_error
from torch.utils.checkpoint import checkpoint

from apex_composer.ops import reference
from apex_composer.triton_kernels.availability import interpreted
from apex_composer.triton_kernels.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SIZES = [(2, 70, 300), (1, 33, 256), (3, 5, 7), (2, 1, 1)]
LARGE = [[4, 4096, 5632], [2, 4096, 11008]]  # TinyLLaMA, LLaMA-2-7B
all_sizes = pytest.mark.parametrize("size", [*SIZES, *on_gpus(LARGE)], ids=str)
# The interpreter rounds to bfloat16 by cutting off, so bfloat16 is tested on GPUs only.
DTYPES = [torch.float32, torch.float16] + ([] if interpreted() else [torch.bfloat16])
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EPSILON = {torch.float32: 6e-8, torch.float16: 4.9e-4, torch.bfloat16: 3.9e-3}


def inputs(size: tuple, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """gate, up and a gradient of their product."""
    return [torch.randn(size).to(device, dtype) for _ in range(3)]


def eager(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def with_gradients(function, gate, up, incoming) -> list[torch.Tensor]:
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    product = function(gate, up)
    return [product.detach(), *torch.autograd.grad(product, (gate, up), incoming)]


@pytest.mark.numeric
@all_dtypes
@all_sizes
def test_product_and_gradients_are_as_exact_as_torch(size, dtype, device):
    tensors = inputs(size, dtype, device)
    exact = with_gradients(eager, *(t.double() for t in tensors))
    torchs = with_gradients(eager, *tensors)
    found = with_gradients(swiglu, *tensors)
    again = with_gradients(swiglu, *tensors)
    for own, other, wanted, second in zip(found, torchs, exact, again, strict=True):
        assert own.dtype == dtype and torch.equal(own, second)
        # Each number is half a dozen roundings of EPSILON, of which two numbers are no average.
        check_error(own, wanted, 2 * max(relative_error(other, wanted), 2 * EPSILON[dtype]))


def check_rounding(found: torch.Tensor, torchs: torch.Tensor) -> None:
    """Compiled, no bit differs. The CPU's exp is a faster approximation, which moves one value in
    10,000 across a boundary; one rounding more or less than eager mode's would move every third.
    """
    differing = (found != torchs) & ~(found.isnan() & torchs.isnan())
    assert differing.double().mean() <= (1e-3 if interpreted() else 0)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", [SIZES[0], *on_gpus(LARGE)], ids=str)
def test_values_are_rounded_where_eager_mode_rounds(size, dtype, device):
    tensors = inputs(size, dtype, device)
    found, torchs = (with_gradients(function, *tensors) for function in (swiglu, eager))
    check_rounding(found[0], torchs[0])
    for own, other in zip(found[1:], torchs[1:], strict=True):
        assert (own != other).float().mean() < 1e-3


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_exponential_has_no_weak_spots(dtype, device):
    """Every value of the dtype but NaN."""
    bits = torch.arange(-(2**15), 2**15, device=device, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    every = every[~every.isnan()].unsqueeze(0)
    ones = torch.ones_like(every)
    check_rounding(swiglu(every, ones), eager(every, ones))


@pytest.mark.numeric
@all_dtypes
@all_sizes
def test_square_sums_are_those_of_the_rounded_product(size, dtype, device):
    gate, up, _ = inputs(size, dtype, device)
    product = swiglu(gate, up)
    for mask in (None, ragged_mask(*size[:2], device)):
        buffer = torch.full((size[0], size[2] + 3), -1.0, device=device)
        sums = buffer[:, 1:-2]
        assert torch.equal(swiglu(gate, up, sums, mask), product)
        check_error(sums, reference.unit_square_sums(product.double(), 1, mask), 5e-7)
        first = sums.clone()
        swiglu(gate, up, sums, mask)
        assert torch.equal(first, sums)
        sums.fill_(-1)
        assert (buffer == -1).all()


@pytest.mark.numeric
@all_sizes
def test_masked_tokens_do_not_count_whatever_they_hold(size, device):
    gate, up, _ = inputs(size, torch.float32, device)
    mask = torch.rand(size[:2]).to(device) < 0.6
    expected = reference.unit_square_sums(eager(gate, up).double(), 1, mask)
    gate[~mask] = float("nan")
    sums = torch.empty(size[0], size[2], device=device)
    for dtype in (torch.bool, torch.int64):
        product = swiglu(gate, up, sums, mask.to(dtype))
        # Up to 70 squares, each sum rounded to 6e-8 of itself at most.
        torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-30)
        assert product[~mask].isnan().all() and not product[mask].isnan().any()


def test_square_sums_notice_their_writing_and_carry_no_gradient(device):
    gate, up, incoming = inputs((2, 5, 4), torch.float32, device)
    sums = torch.zeros(2, 4, device=device)
    product = swiglu(gate.requires_grad_(), up, sums)
    assert sums._version > 0 and not sums.requires_grad
    product.backward(incoming)
    assert gate.grad is not None


@pytest.mark.parametrize("which", [0, 1])
def test_gate_or_up_alone_may_need_a_gradient(which, device):
    tensors = inputs((2, 5, 40), torch.float32, device)
    expected = with_gradients(swiglu, *tensors)[1 + which]
    leaf = tensors[which].requires_grad_()
    product = swiglu(*tensors[:2])
    assert torch.equal(torch.autograd.grad(product, leaf, tensors[2])[0], expected)


@pytest.mark.numeric
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 5, 7), (2, 0, 7), (0, 4)], ids=str)
def test_leading_dimensions_are_free_without_square_sums(shape, device):
    tensors = inputs(shape, torch.float32, device)
    for own, other in zip(
        with_gradients(swiglu, *tensors), with_gradients(eager, *tensors), strict=True
    ):
        # No sums: half a dozen roundings to 6e-8, of factors that are at most a few units.
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_no_tokens_have_zero_square_sums(device):
    empty = torch.ones(2, 0, 3, device=device)
    sums = torch.empty(2, 3, device=device)
    swiglu(empty, empty, sums)
    assert (sums == 0).all()


def test_halves_of_one_projection_are_read_by_their_strides(device):
    both = torch.randn(2, 9, 80, device=device)
    gate, up = both.chunk(2, dim=-1)
    sums, copied = torch.empty(2, 40, device=device), torch.empty(2, 40, device=device)
    incoming = torch.ones((), device=device).expand(2, 9, 40)
    found = with_gradients(lambda g, u: swiglu(g, u, sums), gate, up, incoming)
    expected = with_gradients(
        lambda g, u: swiglu(g, u, copied), gate.contiguous(), up.contiguous(), incoming.contiguous()
    )
    for own, other in zip((*found, sums), (*expected, copied), strict=True):
        assert torch.equal(own, other)


def test_nothing_is_recorded_without_gradients(device):
    gate, up, _ = inputs((2, 5, 4), torch.float32, device)
    with torch.no_grad():
        assert not swiglu(gate.requires_grad_(), up).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_the_same(reentrant, device):
    gate, up, incoming = inputs((2, 9, 40), torch.float16, device)
    expected = with_gradients(swiglu, gate, up, incoming)
    sums = torch.empty(2, 40, device=device)
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    product = checkpoint(lambda *pair: swiglu(*pair, sums), *leaves, use_reentrant=reentrant)
    first = sums.clone()
    product.backward(incoming)
    for own, other in zip((product, *(t.grad for t in leaves)), expected, strict=True):
        assert torch.equal(own, other)
    assert torch.equal(sums, first)


def test_only_gate_and_up_are_kept_for_the_backward_pass(device):
    gate, up, _ = inputs((2, 5, 4), torch.float32, device)
    kept = []

    def pack(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu(gate.requires_grad_(), up, torch.empty(2, 4, device=device))
    assert kept == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.ones(2, 5, 3)}, r"gate has shape .*\[2, 5, 4\].* up has .*\[2, 5, 3\]"),
        ({"up": torch.ones(2, 5, 4).half()}, "gate has dtype torch.float32, up has torch.float16"),
        ({"square_sums": torch.ones(2, 5)}, r"square_sums is \(2, 5\).*needed: \(2, 4\)"),
        ({"square_sums": torch.ones(2, 4), "mask": torch.ones(2, 4)}, r"mask is for \(2, 4\)"),
        ({"gate": torch.ones(2, 4, 5).mT}, "gate has strides .* contiguous"),
        ({"gate": torch.ones(2, 5, 4).double()}, "gate has dtype torch.float64, up has"),
    ],
    ids=["shape", "dtypes", "sums", "mask", "strides", "float64"],
)
def test_what_does_not_fit_is_refused(change, message, device):
    arguments = {"gate": torch.ones(2, 5, 4), "up": torch.ones(2, 5, 4), **change}
    with pytest.raises(ValueError, match=message):
        swiglu(**{name: tensor.to(device) for name, tensor in arguments.items()})


def test_float64_is_refused(device):
    gate = torch.ones(5, 4, device=device, dtype=torch.float64)
    with pytest.raises(ValueError, match="gate is torch.float64, allowed: torch.float32"):
        swiglu(gate, gate)


def test_square_sums_need_samples_and_tokens(device):
    gate = torch.ones(10, 4, device=device)
    with pytest.raises(ValueError, match=r"gate has shape \(10, 4\), allowed: \[samples, tokens"):
        swiglu(gate, gate, torch.ones(10, 4, device=device))
