"""Settings of runs that train rows only, as several tests need them."""

from both_ways import BETAS
from composer.algorithms import GradientClipping
from composer.optim import DecoupledAdamW

from apex_composer import APEX

MODES = {
    "selected": {"trainable": "selected"},
    "half": {"trainable": "half", "trainable_share": 0.84},
    "disadvantageous": {"trainable": "disadvantageous"},
}
STAGES = ["3ba", "3ba"]
DECOUPLED = {
    "optimizer": DecoupledAdamW,
    "settings": {"lr": 1e-2, "betas": BETAS, "eps": 1e-8, "weight_decay": 1e-3},
}


def apex(mode: str = "selected", **settings) -> APEX:
    return APEX(**{"threshold": 0.25, "stages": STAGES, **MODES[mode], **settings})


def clipping() -> GradientClipping:
    return GradientClipping("norm", 0.5)
