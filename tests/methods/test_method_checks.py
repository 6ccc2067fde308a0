"""What several methods refuse, where Composer refuses it on a CPU itself or not at all."""

import pytest
from composer.core import Event, Precision
from composer_run import make_trainer

from apex_composer.methods.act_regu import ActRegu
from apex_composer.methods.gmt import GMT
from apex_composer.methods.hft import HFT
from apex_composer.methods.rmt import RMT

METHODS = {"gmt": GMT, "rmt": RMT, "act_regu": ActRegu}


@pytest.mark.parametrize("method", [*METHODS, "hft"])
def test_llmfoundry_knows_it_by_its_name(method):
    from llmfoundry.utils.builders import build_algorithm

    built = build_algorithm(
        method, {"coefficient": 0.5} if method == "act_regu" else {"share": 0.4}
    )
    assert type(built) is {**METHODS, "hft": HFT}[method]


@pytest.mark.parametrize(("name", "method"), [*METHODS.items(), ("hft", HFT)])
def test_an_unknown_setting_is_refused_in_the_words_of_apex(name, method):
    known = "coefficient" if method is ActRegu else "share"
    told = rf"unknown key '{known}s'\. Did you mean '{known}'\? Known: {known}"
    with pytest.raises(TypeError, match=f"^{name}: {told}"):
        method(**{f"{known}s": 0.5})


@pytest.fixture(scope="module")
def state():
    """That of a trainer without algorithms."""
    trainer = make_trainer()
    yield trainer.state
    trainer.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_scaler_is_refused(method, state, monkeypatch):
    monkeypatch.setattr(state, "_precision", Precision.AMP_FP16)
    told = f"precision: got amp_fp16, allowed with {method}: amp_bf16, fp32"
    with pytest.raises(ValueError, match=told):
        METHODS[method]().apply(Event.INIT, state, None)


@pytest.mark.parametrize("method", METHODS)
def test_tensor_parallelism_is_refused(method, state, monkeypatch):
    monkeypatch.setattr(state, "tp_config", object())
    told = f"tp_config: got tensor parallelism, allowed with {method}"
    with pytest.raises(ValueError, match=told):
        METHODS[method]().apply(Event.INIT, state, None)


@pytest.mark.parametrize("method", [*METHODS.values(), HFT])
def test_a_method_that_is_given_twice_is_refused(method):
    with pytest.raises(ValueError, match="algorithms: got 2 of the kind of .*, allowed: one"):
        make_trainer(method(), method())
