"""What training changed in a model: every weight against the one that it began with."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apex_composer.assessment.selection import Selection
from apex_composer.data_prep.progress import progress_bar
from apex_composer.model.sites import Site, clean_name
from apex_composer.observe.ranks import (
    check_finite,
    check_tolerance,
    computing_device,
    default_tolerance,
    describe_weight,
    entropy_rank,
    full_precision,
    numerical_rank,
    unit_rows,
)
from apex_composer.tools.merged_adapters import merge_adapters
from apex_composer.tools.saved_model import open_saved_model

# Singular values of a change that are kept, and the numbers of them whose energy is told.
_KEPT = 64
_ENERGY = (1, 4, 16, 64)
# Buffers that older files of models have and newer models compute.
_BUFFERS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


@dataclass(frozen=True)
class StoredWeights:
    """A model's weights, which stay on disk until they are asked for.

    Attributes:
        source: folder, name or checkpoint.
        shapes: of each weight by its name.
        read: loads one of them by its name.
    """

    source: str
    shapes: Mapping[str, Sequence[int]]
    read: Callable[[str], Tensor]


def open_weights(source: str | Path) -> StoredWeights:
    """The weights of a Hugging Face model (safetensors), or of a checkpoint of Composer.

    Args:
        source: folder or name of the model, checkpoint file (.pt), or the folder of a sharded one,
            whose adapters are merged into their base.

    Raises:
        FileNotFoundError, ValueError: there is none, or not in a form that is known.
    """
    path = Path(source)
    if path.is_file() or (path / ".metadata").is_file():
        saved = merge_adapters(open_saved_model(path))
        shapes = {name: tuple(one.shape) for name, one in saved.tensors.items()}
        return StoredWeights(str(source), shapes, saved.read)
    files = {name: file for file in _weight_files(str(source)) for name in _names(file)}
    shapes = {name: _slice_shape(file, name) for name, file in files.items()}
    return StoredWeights(str(source), shapes, lambda name: _read(files[name], name))


def measure_changes(
    model: nn.Module,
    sites: Sequence[Site],
    base: StoredWeights,
    selections: Mapping[str, Selection] | None = None,
    *,
    tolerance: float | None = None,
    device: torch.device | str | None = None,
    done: Collection[str] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What training changed, with a progress bar; of the base one weight at a time is in memory.

    D = W - W_0, in float32, or float64 where one of both is. Rounding counts as change: W stored in
    bfloat16 and W_0 in float32 differ by 0.0017 |W_0| untrained.

    Args:
        model: the trained one.
        sites: those of `find_sites(model)`; all other weights are compared as a whole.
        base: what its training began with, see `open_weights`.
        selections: units by group, see `find_selections`. Default: none.
        tolerance: of the change's numerical rank, relative to its largest singular value. Default
            None: see `default_tolerance`.
        device: where singular values are computed. Default: the GPU where there is one.
        done: names of weights to leave out, since an interrupted run has them.

    Yields:
        Name of the weight and its entry. All have `layer`, `projection`, `shape`, `dtypes` (W's,
        W_0's), `change` |D|_F and `relative_change` |D|_F / |W_0|_F (None where W_0 is zero).
        Expanded ones, with the units as rows, also have `advantageous_change`,
        `disadvantageous_change` and `unselected_change`, the relative change of these units' rows
        (None without a selection); `singular_values`, the largest 64 of D; `energy`, the share of
        |D|_F^2 in the first 1, 4, 16, 64 (None where D is zero); `numerical_rank` and
        `entropy_rank` of D.

    Raises:
        ValueError: the models differ in a name or a shape, or numbers are not finite.
    """
    check_tolerance(tolerance)
    device = computing_device(device)
    stored = match_names(model, base)
    parameters = {clean_name(name): one for name, one in model.named_parameters()}
    jobs = _list_jobs(sites, parameters)
    left = [job for job in jobs if job not in done]
    start = len(jobs) - len(left)
    for job in progress_bar(left, desc="changes", total=len(jobs), initial=start, unit="weight"):
        name, site = jobs[job]
        units = (selections or {}).get(site.group.name) if site else None
        pair = parameters[name].detach(), base.read(stored[name])
        wide = torch.promote_types(*(full_precision(one) for one in pair))
        weight, before = (one.to(device, wide) for one in pair)
        check_finite(job, weight)
        check_finite(f"{job} of {base.source}", before)
        dtypes = [str(one.dtype).removeprefix("torch.") for one in pair]
        entry = {**describe_weight(job), "dtypes": dtypes}
        yield job, entry | _compare(site, weight - before, before, units, tolerance)


def _list_jobs(
    sites: Sequence[Site], parameters: Collection[str]
) -> dict[str, tuple[str, Site | None]]:
    """What is compared, by its name: parts of expanded weights, and all other parameters whole."""
    jobs: dict[str, tuple[str, Site | None]] = {
        site.name: (site.name.partition("[")[0], site) for site in sites
    }
    expanded = {name for name, _ in jobs.values()}
    return jobs | {name: (name, None) for name in parameters if name not in expanded}


def match_names(model: nn.Module, base: StoredWeights) -> dict[str, str]:
    """Where a base keeps each of a model's parameters: under its name or that of one tied to it.

    Files of a model without its head (gpt2's) have names without `base_model_prefix`.

    Raises:
        ValueError: the two are not of one architecture and size, with what differs.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    aliases: dict[int, list[str]] = {}
    for name, one in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(one), []).append(clean_name(name))
    found, differing = {}, []
    for name, one in model.named_parameters():
        names = aliases[id(one)]
        names = [*names, *(other.removeprefix(prefix) for other in names)]
        stored = next((other for other in names if other in base.shapes), None)
        if stored is None or tuple(base.shapes[stored]) != tuple(one.shape):
            shape = list(base.shapes[stored]) if stored else "nothing"
            differing.append(f"{clean_name(name)} is {list(one.shape)}, in the base {shape}")
        found[clean_name(name)] = stored
    known = {name.removeprefix(prefix) for names in aliases.values() for name in names}
    known |= {clean_name(name).removeprefix(prefix) for name, _ in model.named_buffers()}
    differing += [
        f"{name} is in the base only"
        for name in base.shapes
        if name.removeprefix(prefix) not in known and not name.endswith(_BUFFERS)
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{base.source} is not the base of this model: {'; '.join(differing[:3])}{more}. "
            "Needed: the model that training began with, of the same architecture and size"
        )
    return found


def _compare(
    site: Site | None,
    change: Tensor,
    before: Tensor,
    units: Selection | None,
    tolerance: float | None,
) -> dict[str, Any]:
    """The numbers of an entry; those of a whole weight where there is no site."""
    if site is None:
        return {"shape": list(change.shape), **_relative(change, before)}
    rows, old = unit_rows(site, change), unit_rows(site, before)
    values = torch.linalg.svdvals(rows)
    relative = default_tolerance(rows.shape, rows.dtype) if tolerance is None else tolerance
    energy = values.double().square().cumsum(0)
    return {
        "shape": list(rows.shape),
        **_relative(rows, old),
        **_changes_by_side(site, change, before, units),
        "singular_values": values[:_KEPT].tolist(),
        "energy": {
            str(count): float(energy[min(count, len(energy)) - 1] / energy[-1]) for count in _ENERGY
        }
        if energy[-1] > 0
        else None,
        "numerical_rank": numerical_rank(values, relative * float(values[0])),
        "entropy_rank": entropy_rank(values),
    }


def _changes_by_side(
    site: Site, change: Tensor, before: Tensor, units: Selection | None
) -> dict[str, float | None]:
    """Relative change of the selected units' rows, and of all others'."""
    sides = {f"{side}_change": side for side in Selection._fields}
    if units is None:
        return dict.fromkeys([*sides, "unselected_change"])
    every = torch.arange(site.group.units)
    rows = {name: getattr(units, side) for name, side in sides.items()}
    rows["unselected_change"] = every[~torch.isin(every, torch.cat(units))]
    return {
        name: _relative(unit_rows(site, change, own), unit_rows(site, before, own))[
            "relative_change"
        ]
        for name, own in rows.items()
    }


def _relative(change: Tensor, before: Tensor) -> dict[str, float | None]:
    norms = [float(torch.linalg.vector_norm(one, dtype=torch.float64)) for one in (change, before)]
    return {"change": norms[0], "relative_change": norms[0] / norms[1] if norms[1] else None}


def _weight_files(source: str) -> list[str]:
    """The safetensors files of a model, as `from_pretrained` finds them."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    options = {"_raise_exceptions_for_missing_entries": False}
    try:
        if whole := cached_file(source, SAFE_WEIGHTS_NAME, **options):
            return [whole]
        if index := cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options):
            return get_checkpoint_shard_files(source, index)[0]
    except OSError as error:
        raise FileNotFoundError(f"{source} cannot be had: {error}") from error
    raise FileNotFoundError(
        f"{source} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}. Needed: a model in "
        "safetensors; from_pretrained(...).save_pretrained(...) writes them of other files"
    )


def _names(file: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return list(weights.keys())


def _slice_shape(file: str, name: str) -> Sequence[int]:
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return weights.get_slice(name).get_shape()


def _read(file: str, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return weights.get_tensor(name)
