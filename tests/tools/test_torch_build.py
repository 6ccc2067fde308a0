"""What runs where, by NVIDIA's rules of compatibility, and what to install where nothing does."""

import re

import pytest

from apex_composer.tools.torch_build import runs_as, which_build

# As torch.cuda.get_arch_list() gives them for the builds of torch 2.7.0 on x86.
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "architectures", "how"),
    [
        ((9, 0), CU126, "binary"),  # H100
        ((8, 0), CU126, "binary"),  # A100
        ((8, 9), CU126, "binary"),  # L40S: sm_86's, of the same major number
        ((6, 1), CU126, "binary"),
        ((10, 0), CU126, None),  # B200
        ((12, 0), CU126, None),  # RTX 5090
        ((10, 0), CU128, "binary"),
        ((10, 3), CU128, "binary"),  # B300: sm_100's
        ((12, 1), CU128, "binary"),
        ((13, 0), CU128, "PTX"),
        ((7, 0), CU128, None),  # V100: older than all
        ((8, 0), ["sm_86"], None),  # of a newer one of the same major number
        ((8, 6), ["sm_80"], "binary"),
        ((9, 0), ["sm_80", "sm_86"], None),
        ((9, 0), ["sm_80", "compute_80"], "PTX"),
        ((7, 5), ["compute_80"], None),
        ((8, 0), ["compute_80"], "PTX"),
        ((9, 0), ["sm_90a"], "binary"),
        ((10, 0), ["sm_90a", "compute_90a"], None),  # `a`: that capability alone
        ((10, 3), ["sm_100a"], None),
        ((10, 3), ["sm_100f"], "binary"),  # `f`: the family
        ((12, 0), ["sm_100f", "compute_100f"], None),
        ((10, 3), ["compute_100f"], "PTX"),
        ((10, 0), [], None),
        ((10, 0), ["gfx90a", "sm_100"], "binary"),
    ],
)
def test_how_code_runs(capability, architectures, how):
    assert runs_as(capability, architectures) == how


@pytest.mark.parametrize(
    ("capability", "architectures", "version", "told"),
    [
        ((12, 0), CU126, "2.7.0", r"pip install 'torch==2.7.0\+cu128', --index-url as pytorch"),
        ((10, 0), CU126, "2.14.1", "install torch built for CUDA 12.8 or newer, --index-url"),
        ((10, 0), CU126, "2.5.1", "install torch 2.7 or newer, built for CUDA 12.8 or newer"),
        ((7, 0), CU128, "2.7.0", "built for an older CUDA, .* \\+cu126 has sm_50 to sm_90"),
        ((9, 0), ["sm_80"], "2.7.0", "install a build of torch that has sm_90"),
        ((9, 0), ["sm_80", "sm_120"], "2.7.0", "install a build of torch that has sm_90"),
        ((12, 0), [], "2.7.0", "cu128"),
    ],
)
def test_what_to_install(capability, architectures, version, told):
    assert re.search(told, which_build(capability, architectures, version))
