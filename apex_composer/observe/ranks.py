"""How many directions each expanded weight uses: its ranks, and those of W[P] and W[N].

Shape legend
    W  a weight with the units as rows, [rows, d]: of o_proj and down_proj the transpose
    P, N  rows of the advantageous and the disadvantageous units
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apex_composer.assessment.selection import Selection
from apex_composer.data_prep.progress import progress_bar
from apex_composer.model.sites import Site, projection_of


def measure_ranks(
    sites: Sequence[Site],
    selections: Mapping[str, Selection] | None = None,
    *,
    tolerance: float | None = None,
    device: torch.device | str | None = None,
    done: Collection[str] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ranks of every expanded weight, one after the other, with a progress bar.

    Singular values are computed in float32, or float64 where weights are: on the CPU float32 was
    within 4e-6 of the largest one, a hundredth of the tolerance, and GPUs are slow at float64.

    With a selection also the assumptions of the paper's section 3.4: W[P] "nearly full rank", W[N]
    "very low rank", their spaces orthogonal. All ranks of a weight are counted above one tolerance,
    as the paper has one epsilon.

    Args:
        sites: those of `find_sites(model)`; parts of a fused projection are weights of their own.
        selections: units by group; groups that are missing (KV heads, say) have no W[P], W[N].
            Default: none.
        tolerance: epsilon, relative to the weight's largest singular value. Default None: see
            `default_tolerance`.
        device: where singular values are computed. Default: the GPU where there is one.
        done: names of weights to leave out, since an interrupted run has them.

    Yields:
        Name of the weight and its entry: `layer`, `projection`, `shape` [rows, d], `tolerance`
        (absolute), `numerical_rank`, `entropy_rank`; `advantageous_rank`, `disadvantageous_rank`
        (numerical), `advantageous_entropy_rank`, `disadvantageous_entropy_rank`,
        `selected_rows` (of each side), `row_space_overlap`, `overlap_by_chance` (that of random
        spaces, max(r_P, r_N) / d), which are None without a selection.

    Raises:
        ValueError: a weight has numbers that are not finite, or the tolerance is out of [0, 1).
    """
    check_tolerance(tolerance)
    device = computing_device(device)
    left = [site for site in sites if site.name not in done]
    for site in progress_bar(
        left, desc="ranks", total=len(sites), initial=len(sites) - len(left), unit="weight"
    ):
        units = (selections or {}).get(site.group.name)
        yield site.name, _measure(site, units, tolerance, device)


def rank_changes(
    ranks: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """By how much the ranks of each weight have grown since a base (entries of `measure_ranks`)."""
    kinds = ("numerical_rank", "entropy_rank")
    return {
        name: {kind: entry[kind] - base[name][kind] for kind in kinds}
        for name, entry in ranks.items()
        if name in base
    }


def numerical_rank(values: Tensor, tolerance: float) -> int:
    """Singular values above a tolerance (Golub and Van Loan, Matrix Computations, section 5.4).

    Args:
        values: singular values, [r].
        tolerance: absolute; `default_tolerance(rows, columns, dtype)` times the largest one is the
            rule of numpy's and torch's `matrix_rank`.
    """
    return int((values > tolerance).sum())


def default_tolerance(shape: Sequence[int], dtype: torch.dtype) -> float:
    """Relative tolerance of `torch.linalg.matrix_rank`: max(m, n) * eps.

    eps is that of the dtype that singular values are computed in, float32 also for weights stored
    in bfloat16: with its own eps (2^-7) the tolerance of 4096 columns would be 32 times the largest
    singular value, and every rank 0. But rounding to bfloat16 lifts singular values that were zero
    to about 2^-10 of the typical entry times sqrt(m) + sqrt(n), which is above this tolerance: to
    look below, say where a low rank was fused into such weights, give a tolerance (0.01).
    """
    return max(shape) * torch.finfo(dtype).eps


def entropy_rank(values: Tensor) -> float:
    """exp(-sum_i p_i ln p_i) with p = sigma / sum(sigma); 0 for the zero matrix.

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO
    2007, definition 1.

    Args:
        values: singular values, [r].
    """
    values = values.double()
    if not values.any():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def row_space_overlap(first: Tensor, second: Tensor) -> float | None:
    """|Q_1 Q_2^T|_F^2 / min(r_1, r_2), the mean squared cosine of the principal angles.

    1 where one space contains the other, 0 where they are orthogonal (assumption 1 of the paper's
    section 3.4). Source: Björck and Golub, Numerical methods for computing angles between linear
    subspaces, Mathematics of Computation 27, 1973: the cosines are the singular values of
    Q_1 Q_2^T.

    Args:
        first: orthonormal rows, [r_1, d].
        second: orthonormal rows, [r_2, d].

    Returns:
        None where one of them has no row.
    """
    smaller = min(len(first), len(second))
    return float((first.double() @ second.double().T).square().sum()) / smaller if smaller else None


def unit_rows(site: Site, weight: Tensor, units: Tensor | None = None) -> Tensor:
    """Rows of a site's units, [units * unit_size, d], in their order.

    Args:
        site: where the units lie in the weight.
        weight: the site's, or another of its shape: a gradient, a change.
        units: their numbers, [k]. Default None: all.
    """
    units = torch.arange(site.group.units) if units is None else units
    rows = weight.index_select(site.axis, site.indices(units).to(weight.device))
    return rows if site.axis == 0 else rows.T


def full_precision(tensor: Tensor) -> torch.dtype:
    """float32, or float64 where it is: LAPACK knows no smaller dtypes."""
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32


def computing_device(device: torch.device | str | None) -> torch.device:
    """The one that is asked for, else the GPU where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_tolerance(tolerance: float | None) -> None:
    """Refuse one that leaves no singular value, or counts none out."""
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: got {tolerance}, allowed: from 0 to below 1, such as 0.01")


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight that has no singular values."""
    if not tensor.isfinite().all():
        raise ValueError(
            f"{name} has {int((~tensor.isfinite()).sum())} numbers that are not finite: its "
            "training diverged, or its file is damaged. Take an earlier checkpoint"
        )


def describe_weight(name: str) -> dict[str, Any]:
    """The `layer` and `projection` in a weight's name: 3 and `q_proj`, or `Wqkv[keys]`."""
    layer = re.search(r"\.(\d+)\.", name)
    return {"layer": int(layer[1]) if layer else None, "projection": projection_of(name)}


def _measure(
    site: Site, units: Selection | None, tolerance: float | None, device: torch.device
) -> dict[str, Any]:
    weight = site.weight.detach().to(device, full_precision(site.weight))
    check_finite(site.name, weight)
    rows = unit_rows(site, weight)
    values = torch.linalg.svdvals(rows)
    relative = default_tolerance(rows.shape, rows.dtype) if tolerance is None else tolerance
    above = relative * float(values[0])
    return {
        **describe_weight(site.name),
        "shape": list(rows.shape),
        "tolerance": above,
        "numerical_rank": numerical_rank(values, above),
        "entropy_rank": entropy_rank(values),
        **_compare_sides(site, weight, units, above),
    }


def _compare_sides(
    site: Site, weight: Tensor, units: Selection | None, tolerance: float
) -> dict[str, Any]:
    """Ranks of W[P] and W[N], and how far their row spaces overlap."""
    names = ("selected_rows", "row_space_overlap", "overlap_by_chance")
    found: dict[str, Any] = dict.fromkeys(names)
    spaces = []
    for side in Selection._fields:
        rank = entropy = None
        if units is not None:
            rows = unit_rows(site, weight, getattr(units, side))
            _, values, directions = torch.linalg.svd(rows, full_matrices=False)
            rank, entropy = numerical_rank(values, tolerance), entropy_rank(values)
            spaces.append(directions[:rank])
            found["selected_rows"] = len(rows)
        found |= {f"{side}_rank": rank, f"{side}_entropy_rank": entropy}
    if spaces:
        found["row_space_overlap"] = row_space_overlap(*spaces)
        found["overlap_by_chance"] = max(map(len, spaces)) / weight.shape[1 - site.axis]
    return found
