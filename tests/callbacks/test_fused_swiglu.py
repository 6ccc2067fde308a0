"""The callback `fused_swiglu`: a run without APEX with the SwiGLU that APEX has."""

import pytest
from composer import Callback
from composer_run import run
from helpers import CHANGE_BOUND, SMOOTH_EPS, change_error, tiny_llama
from llmfoundry.utils.builders import build_callback

from apex_composer.callbacks.fused_swiglu import FusedSwiGLUCallback


@pytest.mark.numeric
def test_a_run_without_apex_may_have_the_same_swiglu():
    _, expected, _ = run(eps=SMOOTH_EPS)
    callback = build_callback("fused_swiglu")
    assert isinstance(callback, FusedSwiGLUCallback) and callback.setting is True
    fused = []

    class Watch(Callback):
        def batch_start(self, state, logger):
            fused.append(len(callback._fused.modules))

    _, weights, _ = run(callbacks=(callback, Watch()), eps=SMOOTH_EPS)
    assert fused == [2] * 6  # both layers, in all batches
    for name, start in tiny_llama().state_dict().items():
        assert change_error(weights[name], expected[name], start) < CHANGE_BOUND, name
    assert callback._fused.modules == {}  # given back when the trainer closed
    run(callbacks=(FusedSwiGLUCallback("auto"),))


def test_settings_of_the_swiglu_callback_are_checked_at_once():
    for wrong in (0, 1, "yes", None):
        with pytest.raises(ValueError, match="fused_swiglu: setting: got .*True, False, auto"):
            FusedSwiGLUCallback(wrong)
    with pytest.raises(TypeError, match="Did you mean 'setting'"):
        FusedSwiGLUCallback(settings=True)
