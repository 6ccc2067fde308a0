"""What gmt and rmt have in common: their place in a batch, resuming, what they refuse."""

import copy

import pytest
import torch
from composer import Callback
from composer.algorithms import GradientClipping
from composer.utils import FSDP2Config, FSDPConfig
from composer_run import assert_same_weights, make_trainer, run
from helpers import tiny_llama
from llmfoundry.callbacks import LayerFreezing
from torch.optim import SGD

from apex_composer import APEX
from apex_composer.methods.gmt import GMT
from apex_composer.methods.rmt import RMT
from apex_composer.methods.s2ft import S2FT

MASKS = {"gmt": GMT, "rmt": RMT}


class Norm(Callback):
    """The norm of the gradients that a batch's step takes."""

    def __init__(self):
        self.norms, self.kept = [], []

    def after_train_batch(self, state, logger):
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        self.kept.append([float((g != 0).float().mean()) for g in gradients])


@pytest.mark.parametrize("method", MASKS)
@pytest.mark.parametrize("first", [True, False])
def test_the_mask_comes_before_clipping_in_any_order(method, first):
    """Clipped before, the norm of what is left would be below the limit."""
    mask, clipping, norm = MASKS[method](), GradientClipping("norm", 1e-3), Norm()
    order = (mask, clipping) if first else (clipping, mask)
    _, weights, _ = run(*order, callbacks=(norm,), max_duration="2ba")
    assert norm.norms == [pytest.approx(1e-3, rel=1e-3)] * 2
    assert_same_weights(
        weights, run(MASKS[method](), GradientClipping("norm", 1e-3), max_duration="2ba")[1]
    )


@pytest.mark.parametrize("method", MASKS)
def test_a_resumed_run_goes_on_with_the_same_bits(method, tmp_path):
    """Also where the run's seed is another one by then: the checkpoint's holds."""
    options = {"microbatch": 2, "max_duration": "4ba"}
    saved = {"save_folder": str(tmp_path), "save_interval": "2ba"}
    _, weights, _ = run(MASKS[method](), GradientClipping("norm", 0.5), **options, **saved)
    load = {"load_path": str(tmp_path / "ep0-ba2-rank0.pt"), "seed": 18}
    model = tiny_llama(seed=1)
    clipping = GradientClipping("norm", 0.5)
    _, found, _ = run(clipping, MASKS[method](), model=model, **options, **load)
    assert_same_weights(found, weights)
    assert weights.keys() == tiny_llama().state_dict().keys()
    with pytest.raises(ValueError, match=f"{method}: share: the checkpoint was trained with 0.6"):
        make_trainer(MASKS[method](share=0.5), **options, **load)


def test_another_seed_than_the_checkpoints_is_refused(tmp_path):
    run(RMT(seed=1), max_duration="1ba", save_folder=str(tmp_path))
    with pytest.raises(ValueError, match="rmt: seed: the checkpoint was trained with 1"):
        make_trainer(RMT(seed=2), load_path=str(tmp_path / "ep0-ba1-rank0.pt"))


@pytest.mark.parametrize("method", MASKS)
@pytest.mark.parametrize("late", [False, True], ids=["frozen", "layer_freezing"])
def test_what_is_frozen_is_left_alone_and_the_share_is_told(method, late):
    """Also where llm-foundry's callback freezes it behind all algorithms, or nothing uses it."""
    model = tiny_llama()
    model.idle = torch.nn.Linear(8, 8, bias=False)
    model.model.embed_tokens.weight.requires_grad_(late)
    callbacks = (LayerFreezing(["model.model.embed_tokens.weight"]),) if late else ()
    start = copy.deepcopy(model.state_dict())
    total = sum(p.numel() for p in model.parameters())
    frozen = model.model.embed_tokens.weight.numel() + model.idle.weight.numel()
    _, weights, log = run(
        MASKS[method](share=0.25), model=model, max_duration="2ba", callbacks=callbacks
    )
    told = [value for _, value in log.data[f"{method}/trained_share"]]
    assert told == [pytest.approx(0.25 * (total - frozen) / total, rel=1e-3)]
    moved = [name for name in start if not torch.equal(start[name], weights[name])]
    assert set(start) - set(moved) == {"model.embed_tokens.weight", "idle.weight"}


@pytest.mark.parametrize("method", MASKS)
def test_beside_an_apex_that_only_reports(method):
    settings = {"optimizer": SGD, "settings": {"lr": 0.1}, "max_duration": "2ba"}
    apex = APEX(stages=1, expansion=False, threshold=0.25)
    _, weights, _ = run(apex, MASKS[method](), **settings)
    assert_same_weights(weights, run(MASKS[method](), **settings)[1])
    assert apex.history


REFUSED = [
    ([GMT(), RMT()], {}, "algorithms: got 2 of the kind of"),
    ([APEX(), GMT()], {}, "algorithms: got gmt beside apex"),
    ([RMT(), APEX(trainable="selected")], {}, "algorithms: got rmt beside apex"),
    ([GMT(), S2FT()], {}, "algorithms: got gmt beside s2ft"),
    ([GMT()], {"parallelism_config": {"fsdp": FSDPConfig()}}, "fsdp_config: got FSDP1"),
]


@pytest.mark.parametrize(("algorithms", "options", "told"), REFUSED)
def test_what_would_be_wrong_is_refused(algorithms, options, told):
    with pytest.raises(ValueError, match=told):
        make_trainer(*algorithms, **options)


@pytest.mark.parametrize("method", MASKS)
@pytest.mark.parametrize("share", [0, 1, 1.5, "half", True, float("nan")])
def test_a_share_that_is_none_is_refused(method, share):
    with pytest.raises(ValueError, match=f"{method}: share: got {share!r}, allowed: a number in"):
        MASKS[method](share=share)


def test_fsdp2_on_one_rank_is_no_reason_to_refuse():
    make_trainer(GMT(), parallelism_config={"fsdp": FSDP2Config()}).close()
