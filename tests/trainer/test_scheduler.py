"""The learning rate that goes with the stages."""

import pytest
import torch
from composer import Callback, ComposerModel, Trainer
from composer_run import state_of
from torch import nn
from torch.utils.data import DataLoader

from apex_composer.trainer.scheduler import StagewiseScheduler


def rates(scheduler, max_duration, times, unit="batch", **options) -> list[float]:
    return [
        scheduler.multiplier(state_of(max_duration, **options, **{unit: time})) for time in times
    ]


def test_the_papers_learning_rates_are_the_default():
    found = rates(StagewiseScheduler(), "9ba", range(10))
    assert found == [1.0] * 3 + [0.4] * 3 + [0.1] * 3 + [0.1]


def test_uneven_stages_and_multipliers():
    scheduler = StagewiseScheduler(["1ba", "3ba"], lr_multipliers=[2, 0])
    assert rates(scheduler, "4ba", range(5)) == [2.0, 0.0, 0.0, 0.0, 0.0]


def test_stages_in_tokens():
    scheduler = StagewiseScheduler(["100tok", "50tok"], lr_multipliers=[1, 0.5])
    times = [0, 99, 100, 149]
    assert rates(scheduler, "150tok", times, unit="token") == [1, 1, 0.5, 0.5]


def test_every_stage_warms_up_from_zero():
    scheduler = StagewiseScheduler(2, lr_multipliers=[1.0, 0.4], t_warmup="2ba")
    found = rates(scheduler, "8ba", range(8))
    assert found == pytest.approx([0, 0.5, 1, 1, 0, 0.2, 0.4, 0.4])


def test_a_warmup_per_stage():
    scheduler = StagewiseScheduler(2, lr_multipliers=[1.0, 0.4], t_warmup=["0ba", "0.5dur"])
    found = rates(scheduler, "8ba", range(8))
    assert found == pytest.approx([1, 1, 1, 1, 0, 0.1, 0.2, 0.3])


def test_a_warmup_in_epochs():
    scheduler = StagewiseScheduler(1, lr_multipliers=[1.0], t_warmup="1ep")
    found = rates(scheduler, "2ep", range(5), dataloader_len=2)
    assert found == [0, 0.5, 1, 1, 1]


def test_a_warmup_in_another_unit_is_refused():
    scheduler = StagewiseScheduler(3, t_warmup="10tok")
    with pytest.raises(ValueError, match="^t_warmup: got 10tok, but the stages are in ba"):
        scheduler.multiplier(state_of("9ba"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"stages": 2}, r"^lr_multipliers: got 3 values for 2 stages, allowed: one each$"),
        ({"stages": ["1ba"] * 4}, r"^lr_multipliers: got 3 values for 4 stages"),
        ({"t_warmup": ["1ba", "1ba"]}, r"^t_warmup: got 2 values for 3 stages"),
        ({"t_warmup": "1"}, r"^t_warmup: got '1', allowed: a Composer time string"),
        ({"t_warmup": "-1ba"}, r"^t_warmup: got '-1ba'"),
        (
            {"lr_multipliers": [1, 0.4, -0.1]},
            r"^lr_multipliers: got .*-0\.1.*allowed: numbers of 0 or more",
        ),
        ({"stages": 0}, r"^stages: got 0"),
        ({"lr_multipliers": 0.5}, r"^lr_multipliers: got 0\.5"),
        ({"lr_multipliers": [1, "x", 2]}, r"^lr_multipliers: got .*x"),
        ({"t_warmup": 0}, r"^t_warmup: got 0"),
        ({"t_warmup": torch.tensor(3)}, r"^t_warmup: got tensor\(3\), allowed: a Composer time"),
        ({"t_warmup": "infdur"}, r"^t_warmup: got 'infdur'"),
        ({"lr_multipliers": [1, float("nan"), 2]}, r"^lr_multipliers: got nan"),
        ({"lr_multipliers": [1, float("inf"), 2]}, r"^lr_multipliers: got inf"),
        ({"lr_multipliers": [True, 1, 2]}, r"^lr_multipliers: got True"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        StagewiseScheduler(**settings)


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="stagewise: unknown key 'warmup'. Did you mean 't_warmup'"):
        StagewiseScheduler(warmup="1ba")


def test_a_stretched_schedule_is_refused():
    with pytest.raises(ValueError, match="^scale_schedule_ratio: got 0.5, allowed with stagewise"):
        StagewiseScheduler()(state_of("9ba"), ssr=0.5)


def test_a_longer_second_fit_is_laid_out_anew():
    scheduler = StagewiseScheduler(2, lr_multipliers=[1.0, 0.5])
    assert rates(scheduler, "4ba", [1, 2]) == [1.0, 0.5]
    assert rates(scheduler, "8ba", [2, 4]) == [1.0, 0.5]


class Line(ComposerModel):
    """A model of one weight; the scheduler does not care."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, batch):
        return self.layer(batch)

    def loss(self, outputs, batch):
        return outputs.square().mean()


class Rates(Callback):
    """The learning rate that every batch was trained with."""

    def __init__(self):
        self.seen = []

    def batch_start(self, state, logger):
        self.seen.append(state.optimizers[0].param_groups[0]["lr"])


def fit(scheduler, max_duration: str) -> list[float]:
    model, rates = Line(), Rates()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(torch.ones(6, 1), batch_size=2),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.5),
        schedulers=scheduler,
        max_duration=max_duration,
        callbacks=[rates],
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return rates.seen


@pytest.mark.parametrize("max_duration", ["6ba", "2ep"])
def test_a_stages_learning_rate_arrives_one_batch_late_under_composer(max_duration):
    """Documented: Composer steps schedulers before its clock advances."""
    found = fit(StagewiseScheduler(2, lr_multipliers=[1.0, 0.4]), max_duration)
    assert found == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.2, 0.2])


def test_stages_that_do_not_fit_are_refused_before_the_first_batch():
    with pytest.raises(ValueError, match="^stages: they end at .* which is longer than training"):
        fit(StagewiseScheduler(["9ba"], lr_multipliers=[1.0]), "6ba")


@pytest.mark.parametrize(
    ("warmup", "told"),
    [("5ba", "t_warmup: got 5ba, allowed: no longer than its stage .4ba"), ("5sp", "same unit")],
)
def test_a_warmup_that_does_not_fit_its_stage_is_refused(warmup, told):
    scheduler = StagewiseScheduler(stages=["6ba", "4ba"], lr_multipliers=[1, 1], t_warmup=warmup)
    with pytest.raises(ValueError, match=told):
        scheduler.multiplier(state_of("10ba"))
