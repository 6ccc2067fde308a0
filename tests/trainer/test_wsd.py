"""The scheduler `wsd`: its formula against a plain one, its seams, and what it does in a run."""

import math

import pytest
from composer_run import assert_same_weights, make_trainer, state_of
from helpers import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from test_scheduler import Rates, fit

from apex_composer import APEX
from apex_composer.trainer.wsd import REMAINING, WSDScheduler


def rates(scheduler, max_duration, times, unit="batch", **options) -> list[float]:
    return [scheduler(state_of(max_duration, **options, **{unit: time})) for time in times]


def reference(cycles, warmup, stable, decay, kind, alpha_i, alpha_f) -> list[float]:
    """alpha(0) to alpha(T), span by span."""
    shapes = {
        "1-sqrt": lambda x: math.sqrt(x),
        "linear": lambda x: x,
        "cosine": lambda x: 0.5 - 0.5 * math.cos(math.pi * x),
    }
    found = []
    for cycle in range(cycles):
        start = 0.0 if cycle == 0 else alpha_f
        found += [(1 - i / warmup) * start + i / warmup * alpha_i for i in range(warmup)]
        found += [alpha_i] * stable
        gone = [shapes[kind](i / decay) for i in range(decay)]
        found += [(1 - x) * alpha_i + x * alpha_f for x in gone]
    return [*found, alpha_f]


@st.composite
def schedules(draw):
    alpha_i = draw(st.floats(0.01, 2))
    return (
        draw(st.integers(1, 3)),
        draw(st.integers(0, 5)),
        draw(st.integers(0, 5)),
        draw(st.integers(1, 7)),
        draw(st.sampled_from(sorted(REMAINING))),
        alpha_i,
        draw(st.floats(0, 1)) * alpha_i,
    )


@given(schedules())
def test_every_rate_is_that_of_the_plain_formula(schedule):
    cycles, warmup, stable, decay, kind, alpha_i, alpha_f = schedule
    cycle = warmup + stable + decay
    scheduler = WSDScheduler(
        f"{warmup}ba", f"{decay}ba", kind, alpha_i, alpha_f, None if cycles == 1 else f"{cycle}ba"
    )
    total = cycles * cycle
    found = rates(scheduler, f"{total}ba", range(total + 1))
    assert found == pytest.approx(reference(*schedule), rel=1e-12, abs=1e-12)
    assert found[-1] == alpha_f and rates(scheduler, f"{total}ba", [total + 5]) == [alpha_f]
    for start in range(0, total, cycle):
        down = found[start + warmup + stable : start + cycle]
        assert found[start + warmup] == down[0] == alpha_i  # a span begins where the last ended
        assert down == sorted(down, reverse=True) and min(down) >= alpha_f
        up = found[start : start + warmup + 1]
        assert up == sorted(up) and up[0] in (0, alpha_f, alpha_i)


def test_the_seams():
    spans = WSDScheduler("1ba", "2ba", t_cycle="5ba").spans(state_of("10ba"))
    assert spans.seams() == [0, 1, 3, 5, 6, 8, 10]
    assert WSDScheduler().spans(state_of("10ba")).seams() == [0, 9, 10]


def test_spans_in_tokens_shares_and_epochs():
    scheduler = WSDScheduler("10tok", "0.5dur", "linear")
    found = rates(scheduler, "100tok", [0, 5, 10, 50, 75, 100], unit="token")
    assert found == [0, 0.5, 1, 1, 0.5, 0]
    scheduler = WSDScheduler("1ep", "0.25dur", "linear")
    assert rates(scheduler, "2ep", range(9), dataloader_len=4) == pytest.approx(
        [0, 0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0]
    )


@pytest.mark.parametrize(
    ("settings", "max_duration", "told"),
    [
        ({"t_decay": "10tok"}, "9ba", "^t_decay: got 10tok, but the clock of the run is in ba"),
        ({"t_warmup": "3sp"}, "9ba", "^t_warmup: got 3sp, .*max_duration 9ba.: give both"),
        ({"t_warmup": "5ba", "t_decay": "5ba"}, "9ba", "together 10ba, allowed: .*the run .9ba"),
        ({"t_decay": "4ba", "t_cycle": "3ba"}, "9ba", "together 4ba, allowed: .*a cycle .3ba"),
        ({"t_decay": "1ba", "t_cycle": "4ba"}, "9ba", "^t_cycle: got 4ba .*max_duration 9ba"),
        ({"t_decay": "1ba", "t_cycle": "10ba"}, "9ba", "^t_cycle: got 10ba"),
        ({"t_decay": "0.01dur"}, "9ba", "^t_decay: got 0.01dur, which is less than 1ba"),
        ({}, "2ep", "t_decay, t_cycle: 2ep cannot be laid out in batches"),
        ({}, "9iter", "^max_duration: got 9iter, allowed with wsd: ba, sp, tok, ep"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(settings, max_duration, told):
    with pytest.raises(ValueError, match=told):
        WSDScheduler(**settings)(state_of(max_duration))


def test_what_does_not_fit_the_run_is_refused_before_the_first_batch():
    with pytest.raises(ValueError, match="^t_warmup, t_decay: got 0ba and 7ba, together 7ba"):
        fit(WSDScheduler(t_decay="7ba"), "6ba")
    with pytest.raises(ValueError, match="^max_duration: not given, but wsd decays towards it"):
        fit(WSDScheduler(), None)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"t_decay": "0ba"}, "^t_decay: got '0ba', allowed: a Composer time string"),
        ({"t_warmup": 3}, "^t_warmup: got 3"),
        ({"t_cycle": "-1ba"}, "^t_cycle: got '-1ba'"),
        ({"decay": "sqrt"}, "^decay: got 'sqrt', allowed: 1-sqrt, linear, cosine"),
        ({"alpha_f": -0.1}, "^alpha_f: got -0.1, allowed: a number of 0 or more"),
        ({"alpha_f": float("nan")}, "^alpha_f: got nan"),
        ({"alpha_f": 0.5, "alpha_i": 0.4}, "^alpha_f: got 0.5, allowed: no more than alpha_i"),
        ({"alpha_i": "1"}, "^alpha_i: got '1'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        WSDScheduler(**settings)


def test_unknown_settings_and_a_stretched_schedule_are_refused():
    with pytest.raises(TypeError, match="wsd: unknown key 'tdecay'. Did you mean 't_decay'"):
        WSDScheduler(tdecay="1ba")
    with pytest.raises(ValueError, match="^scale_schedule_ratio: got 0.5, allowed with wsd: 1.0"):
        WSDScheduler()(state_of("9ba"), ssr=0.5)


def test_the_rates_of_a_run_are_a_batch_late_to_the_last():
    """Documented: batch n has alpha(n - 1), so the last one of six alpha(4), not alpha(6)."""
    found = fit(WSDScheduler("1ba", "4ba", "linear", alpha_f=0.2), "6ba")
    assert found == pytest.approx([0.5 * alpha for alpha in (0, 0, 1, 1, 0.8, 0.6)])


def train(*algorithms, callbacks=(), **options) -> tuple[dict, list[float]]:
    model, seen = tiny_llama(), Rates()
    trainer = make_trainer(
        *algorithms,
        model=model,
        schedulers=WSDScheduler("1ba", "4ba"),
        callbacks=(seen, *callbacks),
        **options,
    )
    trainer.fit()
    trainer.close()
    return dict(model.state_dict()), seen.seen


@pytest.mark.parametrize(
    "stages", [None, 1, ["1ba", {"duration": "5ba", "expansion": False}]], ids=str
)
def test_a_resume_in_the_decay_goes_on_bit_for_bit(tmp_path, stages):
    def algorithms():
        return [] if stages is None else [APEX(stages=stages)]

    weights, rates = train(*algorithms(), save_folder=str(tmp_path), save_interval="1ba")
    again, late = train(*algorithms(), load_path=str(tmp_path / "ep0-ba4-rank0.pt"))
    assert_same_weights(weights, again)
    assert len(late) == 2 and late == rates[4:]


def test_apex_in_any_stages_has_the_rates_of_the_run_without():
    assert train(APEX(stages=["1ba", "2ba", "3ba"]))[1] == train()[1]
