"""Sums of squares per sample and unit against the float64 reference."""

import pytest
import torch
from kernel_cases import check_error, on_gpus, ragged_mask, relative_error

from apex_composer.ops import reference
from apex_composer.triton_kernels import unit_square_sums

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOLERANCE = 5e-7
# samples, tokens, units, unit size: heads of 64 and of 80, channels, odd ones, one token, one unit
SIZES = [(2, 70, 4, 64), (2, 33, 3, 80), (3, 65, 300, 1), (1, 5, 7, 3), (2, 1, 1, 1), (4, 9, 1, 6)]
# Heads and channels of TinyLLaMA and LLaMA-2-7B, and an odd number of tokens.
LARGE = [[4, 4096, 32, 64], [4, 4096, 5632, 1], [4, 4096, 32, 128], [2, 4096, 11008, 1]]
LARGE += [[2, 4097, 3, 80]]
LONG = (1, 4100, 1, 4)  # so many tokens that a split has more than one round of tiles
all_sizes = pytest.mark.parametrize("size", [*SIZES, *on_gpus(LARGE)], ids=str)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def activation_of(size: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    samples, tokens, units, unit_size = size
    return torch.randn(samples, tokens, units * unit_size).to(device, dtype)


@all_dtypes
@all_sizes
def test_sums_equal_the_reference(size, dtype, device):
    activation = activation_of(size, dtype, device)
    exact = reference.unit_square_sums(activation.double(), size[3])
    torchs_error = relative_error(reference.unit_square_sums(activation, size[3]), exact)
    found = unit_square_sums(activation, size[3])
    assert found.dtype == torch.float32 and found.shape == exact.shape
    check_error(found, exact, max(TOLERANCE, 2 * torchs_error))
    assert torch.equal(unit_square_sums(activation, size[3]), found)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *((size, torch.float16) for size in [*SIZES, LONG]),
        *on_gpus([(size, dtype) for size in LARGE for dtype in DTYPES]),
    ],
    ids=str,
)
def test_masked_tokens_do_not_count_whatever_they_hold(size, dtype, device):
    activation = activation_of(size, dtype, device)
    mask = ragged_mask(*size[:2], device)
    exact = reference.unit_square_sums(activation.double(), size[3], mask)
    torchs_error = relative_error(reference.unit_square_sums(activation, size[3], mask), exact)
    activation[~mask] = float("nan")
    activation[:, 0] = torch.where(mask[:, :1], activation[:, 0], float("inf"))
    found = unit_square_sums(activation, size[3], mask)
    check_error(found, exact, max(TOLERANCE, 2 * torchs_error))
    for kind in (torch.int64, torch.float32):
        assert torch.equal(unit_square_sums(activation, size[3], mask.to(kind)), found)


def test_samples_without_a_counted_token_have_zero_norms(device):
    activation = torch.full((2, 5, 4), float("nan"), device=device)
    mask = torch.zeros(2, 5, dtype=torch.bool, device=device)
    assert torch.equal(unit_square_sums(activation, 2, mask).cpu(), torch.zeros(2, 2))
    assert torch.equal(unit_square_sums(activation[:, :0], 2).cpu(), torch.zeros(2, 2))


def test_a_sample_does_not_depend_on_those_beside_it(device):
    activation = torch.randn(5, 70, 96, device=device)
    together = unit_square_sums(activation, 32)
    for place in range(5):
        alone = unit_square_sums(activation[place : place + 1], 32)
        assert torch.equal(alone[0], together[place])


def test_results_may_go_into_a_part_of_a_buffer(device):
    """Assessment keeps one buffer [layers, samples, units] for a model."""
    activation = torch.randn(3, 20, 12, device=device)
    buffer = torch.full((4, 3, 10), -1.0, device=device)
    out = buffer[2, :, 1:7]
    version = buffer._version
    assert unit_square_sums(activation, 2, out=out) is out
    assert buffer._version > version
    assert torch.equal(buffer[2, :, 1:7], unit_square_sums(activation, 2))
    buffer[2, :, 1:7] = -1
    assert (buffer == -1).all()


def test_large_activations_are_read_by_their_strides(device):
    wide = torch.randn(3, 2, 20, 40, device=device)
    part = wide[:, 1, ::2, 8:32]
    exact = reference.unit_square_sums(part.double(), 6)
    assert relative_error(unit_square_sums(part, 6), exact) < TOLERANCE


def test_no_gradient_flows(device):
    activation = torch.randn(2, 5, 4, device=device, requires_grad=True)
    assert not unit_square_sums(activation, 2).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": torch.ones(5, 4)}, r"\(5, 4\), allowed: \[samples, tokens, width\]"),
        ({"activation": torch.ones(2, 5, 4).double()}, "float64, allowed: .*bfloat16"),
        ({"activation": torch.ones(2, 4, 5).mT}, r"last dimension must be contiguous"),
        ({"unit_size": 3}, "unit_size is 3, the activation's 4 columns"),
        ({"unit_size": 0}, "unit_size is 0"),
        ({"mask": torch.ones(2, 4)}, r"mask is for \(2, 4\).*has \(2, 5\)"),
        ({"out": torch.ones(2, 3)}, r"out is \(2, 3\) .* needed: \(2, 2\)"),
        ({"out": torch.ones(2, 2).double()}, "float64 on .* torch.float32"),
        ({"out": torch.ones(2, 2).t()}, "rows must be contiguous"),
        ({"out": torch.ones(2, 2, requires_grad=True)}, "requires grad"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:12],
)
def test_what_does_not_fit_is_refused(change, message, device):
    arguments = {"activation": torch.ones(2, 5, 4), "unit_size": 2, **change}
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    if "requires grad" in message:
        arguments["out"] = arguments["out"].detach().requires_grad_()
    with pytest.raises(ValueError, match=message):
        unit_square_sums(**arguments)
