"""AdamW on rows is torch's on each of them, and counts their steps one by one."""

import pytest
import torch
from helpers import linear_site
from torch.optim import AdamW

from apex_composer.sharding.shards import find_shards
from apex_composer.trainable.row_optimizer import RowAdamW, check_main, move_moments
from apex_composer.trainable.rows import Rows, make_rows

pytestmark = pytest.mark.numeric
SITES = {
    "rows": {"rows": 9, "columns": 5, "bias": True},
    "columns": {"rows": 5, "columns": 9, "axis": 1},
    "heads": {"rows": 18, "columns": 5, "unit_size": 2, "bias": True},
    "transposed": {"rows": 5, "columns": 9, "axis": 1, "bias": True, "transposed": True},
}


def rows_of(site, units: list[int]) -> Rows:
    (shards,) = find_shards([site])
    return make_rows(site, shards, torch.tensor(units))


def follow(rows: Rows, moments: dict | None = None, **options) -> tuple[AdamW, RowAdamW]:
    main = AdamW(rows.site.parameters(), **options)
    places = dict.fromkeys(rows.site.parameters(), 0)
    return main, RowAdamW([rows], main, places, {} if moments is None else moments)


def random_gradients(rows: Rows, seed: int) -> dict[tuple[int, int], torch.Tensor]:
    """Give every copy a gradient; the same by part and index of the site's axis."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for place, part in enumerate(rows.parts):
        whole = torch.randn(part.shard.shape, generator=generator, dtype=torch.float64)
        part.copy.grad = whole.index_select(part.axis, part.local).view_as(part.copy)
        for i in part.local.tolist():
            found[place, i] = whole.select(part.axis, i)
    return found


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("maximize", [False, True])
def test_each_row_steps_as_torch_does(kind, maximize):
    site = linear_site(**SITES[kind])
    options = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    options["maximize"] = maximize
    alone: dict[tuple[int, int], torch.nn.Parameter] = {}
    optimizers: dict[tuple[int, int], AdamW] = {}
    before, moments = None, {}
    for stage, units in enumerate(([0, 3, 4], [1, 3, 8], [3, 4, 8])):
        rows = rows_of(site, units)
        main, now = follow(rows, moments, **options)
        if before is not None:
            move_moments(moments, before, rows)
        for step in range(3):
            main.param_groups[0]["lr"] = 0.03 / (1 + step)
            gradients = random_gradients(rows, 10 * stage + step)
            for key in set(optimizers) - set(gradients):
                del alone[key], optimizers[key]
            for (place, i), gradient in gradients.items():
                if (place, i) not in alone:
                    part = rows.parts[place]
                    held = part.shard.parameter.detach().view(part.shard.shape)
                    value = torch.nn.Parameter(held.select(part.axis, i).clone())
                    alone[place, i], optimizers[place, i] = value, AdamW([value], **options)
                alone[place, i].grad = gradient
                optimizers[place, i].param_groups[0]["lr"] = 0.03 / (1 + step)
                optimizers[place, i].step()
            now.step()
        for place, part in enumerate(rows.parts):
            part.write()
            matrix = part.copy.detach().view(-1, 1) if part.copy.dim() == 1 else part.copy.detach()
            for j, i in enumerate(part.local.tolist()):
                torch.testing.assert_close(matrix.select(part.axis, j), alone[place, i].detach())
        before = rows


def test_a_row_without_a_gradient_is_passed_over():
    rows = rows_of(linear_site(**SITES["rows"]), [0, 3])
    start = [part.copy.detach().clone() for part in rows.parts]
    _, optimizer = follow(rows, lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert all(map(torch.equal, start, [part.copy.detach() for part in rows.parts]))
    assert not optimizer.state


@pytest.mark.parametrize("options", [{"amsgrad": True}, {}])
def test_amsgrad_is_refused(options):
    main = AdamW([torch.zeros(1)], lr=0.1, **options)
    if not options:
        check_main(main)
        return
    with pytest.raises(ValueError, match="the optimizer is AdamW with amsgrad, allowed"):
        check_main(main)
