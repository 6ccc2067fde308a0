"""The authors' operator against training by autograd, against the package's, and against none."""

import pytest
import torch
from autograd_oracle import Oracle, assert_same, monarch, train_exactly
from reproduce.arms import Arm
from reproduce.authors import PIECES, product, square_blocks
from tiny_arms import equal, run, start, train_stage

from apex_composer.ops.monarch import init_factors, multiply

RATE, STEPS, APEX = 5e-3, 3, {"threshold": 0.25}
ALL = {"authors": PIECES, "fresh_moments": True}


def arm_of(*pieces, **more):
    return Arm("authors", apex=APEX, variation={"authors": pieces, **more})


def projection(place):
    return place.site.name.split(".")[-2]


def leaves_of(places, pieces):
    """By site: L, R, D_N and D_P as leaves of their own, shared by name as in the authors' code."""
    known, found = {}, {}
    for place in places:
        module, kind = place.site.name.rsplit(".", 2)[0], projection(place)
        tie = module if "shared" in pieces else place.site.name
        left, right = (own.detach().clone() for own in place.factors)
        assert not left.any()
        factors = known.setdefault(tie, [left.requires_grad_(), right.requires_grad_()])
        assert torch.equal(factors[1].detach(), right)
        ones = torch.ones(len(place.weak), dtype=torch.float64)
        scales = [None, None]
        if "diagonals" in pieces and kind not in ("q_proj", "k_proj"):
            scales[0] = known.setdefault((module, "D_N"), ones.clone().requires_grad_())
            if kind in ("v_proj", "gate_proj", "up_proj"):
                scales[1] = ones.clone().requires_grad_()
        found[place.site.name] = [*factors, *scales]
    return found


def effective_of(places, leaves):
    def effective(base):
        weights = dict(base)
        for place in places:
            weight, axis = base[place.site.name], place.site.axis
            left, right, weak_scale, strong_scale = leaves[place.site.name]
            whole = torch.eye(weight.shape[axis], dtype=torch.float64)
            whole = whole.index_put(
                (place.weak.unsqueeze(1), place.strong.unsqueeze(0)), monarch(left, right)
            )
            for indices, scale in ((place.weak, weak_scale), (place.strong, strong_scale)):
                if scale is not None:
                    whole = whole.index_put((indices, indices), scale)
            weights[place.site.name] = whole @ weight if axis == 0 else weight @ whole.t()
        return weights

    return effective


@pytest.mark.parametrize(
    "variation",
    [*({"authors": [piece]} for piece in ("order", "blocks", "shared", "diagonals")), ALL],
    ids=str,
)
def test_two_stages_are_those_of_autograd(variation):
    started = start(Arm("authors", apex=APEX, variation=variation), double=True)
    oracle = Oracle(started)
    for stage in range(2):
        started.varied.begin(stage)
        places = list(started.varied.authors.places)
        leaves = leaves_of(places, variation["authors"])
        unique = {id(one): one for own in leaves.values() for one in own if one is not None}
        fresh = bool(variation.get("fresh_moments"))
        oracle.begin(effective_of(places, leaves), unique.values(), forget=fresh)
        numbers = range(5 * stage, 5 * stage + STEPS)
        train_exactly(started, numbers, RATE)
        oracle.train(numbers, RATE)
        assert_same(started, oracle)
        for place in places:
            trained = [*place.factors, place.weak_scale, place.strong_scale]
            for own, expected in zip(trained, leaves[place.site.name], strict=True):
                assert (own is None) == (expected is None)
                if own is not None:
                    torch.testing.assert_close(own, expected, rtol=0, atol=1e-9)
                    assert not torch.equal(own.detach(), torch.ones_like(own))


def test_without_any_piece_it_is_the_package_s_operator():
    own, package = (start(arm, double=True) for arm in (arm_of(), Arm("apex", apex=APEX)))
    for stage in range(2):
        for one in (own, package):
            one.varied.begin(stage)
            train_exactly(one, range(5 * stage, 5 * stage + STEPS), RATE)
        for name, value in own.weights().items():
            torch.testing.assert_close(value, package.weights()[name], rtol=0, atol=1e-10)
        first, second = own.varied.measure(), package.varied.measure()
        assert (
            first.keys() == second.keys()
            and first["operators"].keys() == second["operators"].keys()
        )
        assert first["relative_norm"] == pytest.approx(second["relative_norm"])
        assert first["effective_rank"] == pytest.approx(second["effective_rank"], rel=1e-4)


def test_operators_that_do_not_learn_leave_conventional_training_bit_for_bit():
    vanilla = run(Arm("vanilla"), batches=3)
    frozen = start(arm_of(*PIECES))
    frozen.varied.authors._lr_scale = 0.0
    for stage in range(2):
        train_stage(frozen, stage, 3)
    assert equal(frozen, vanilla)
    assert not equal(run(arm_of(*PIECES), batches=3), vanilla)


def test_moments_from_zero_are_those_of_an_optimizer_that_has_forgotten():
    alone = Arm("alone", apex={"expansion": False}, variation={"fresh_moments": True})
    found, plain = start(alone), start(Arm("vanilla"))
    for stage in range(2):
        plain.optimizer.state.clear()
        for one in (found, plain):
            train_stage(one, stage, 3)
    assert equal(found, plain)
    assert not equal(found, run(Arm("vanilla"), batches=3))


def test_r_starts_uniform_within_a_q_th():
    started = start(arm_of("start"))
    started.varied.begin(0)
    for place in started.varied.authors.places:
        right = place.factors.right.detach() * place.factors.right.shape[-1]
        assert right.abs().max() < 1 and right.min() < -0.5 and right.max() > 0.5
    whole = torch.cat([p.factors.right.detach().flatten() * p.factors.right.shape[-1]
                       for p in started.varied.authors.places])  # fmt: skip
    assert float(whole.std()) == pytest.approx(3**-0.5, rel=0.1)


def test_rows_are_in_the_order_of_scores():
    ordered, plain = start(arm_of("order")), start(arm_of())
    for one in (ordered, plain):
        one.varied.begin(0)
    expander, changed = ordered.varied.expander, 0
    for place, other in zip(
        ordered.varied.authors.places, plain.varied.authors.places, strict=True
    ):
        group, size = place.site.group, place.site.group.unit_size
        scores = expander.ranked[(group.assessed_by or group).name]
        strong, weak = (rows[::size] // size for rows in (place.strong, place.weak))
        assert scores[strong].tolist() == sorted(scores[strong].tolist(), reverse=True)
        assert scores[weak].tolist() == sorted(scores[weak].tolist())
        for rows, usual in ((place.strong, other.strong), (place.weak, other.weak)):
            assert torch.equal(rows.sort().values, usual)
            changed += not torch.equal(rows, usual)
            within = torch.arange(size).repeat(len(rows) // size)
            assert torch.equal(rows % size, within)
    assert changed


def test_what_is_shared_and_what_is_left_without():
    started = start(arm_of("shared", "diagonals"))
    started.varied.begin(0)
    places = {place.site.name: place for place in started.varied.authors.places}
    assert len(places) == 10
    for layer in range(2):
        v, o, gate, up, down = (
            places[f"model.layers.{layer}.{name}_proj.weight"]
            for name in ("self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
        )
        assert v.factors is o.factors and gate.factors is up.factors is down.factors
        assert v.weak_scale is o.weak_scale and gate.weak_scale is up.weak_scale is down.weak_scale
        assert v.factors is not gate.factors and v.weak_scale is not gate.weak_scale
        assert o.strong_scale is None and down.strong_scale is None
        assert len({id(one.strong_scale) for one in (v, gate, up)}) == 3


def test_blocks_are_square_and_as_many_as_the_divisor_next_to_the_root():
    found = {size: square_blocks(size)[:2] for size in (12, 16, 32, 128, 352, 7)}
    assert found == {12: (3, 4), 16: (4, 4), 32: (4, 8), 128: (8, 16), 352: (16, 22), 7: (1, 7)}
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    _, right = init_factors(12, generator=generator, dtype=torch.float64)
    left = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    factors = type(init_factors(12, generator=generator))(left, right)
    torch.testing.assert_close(product(factors, rows), multiply(factors, rows))
    torch.testing.assert_close(product(factors, rows), monarch(left, right) @ rows)


@pytest.mark.parametrize(
    "apex, variation, message",
    [
        ({}, {"authors": ["order", "tied"]}, "authors: got tied, allowed: start, order, blocks"),
        ({}, {"authors": ["order"], "tied": True}, "authors: .* leave out tied"),
        ({"method": "random"}, {"authors": ["order"]}, "authors: .* leave out method"),
        ({"expansion": False}, {"authors": ["order"]}, "authors: varies operators"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(apex, variation, message):
    with pytest.raises(ValueError, match=message):
        start(Arm("wrong", apex=apex, variation=variation))
