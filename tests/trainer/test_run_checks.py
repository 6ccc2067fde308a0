"""What is refused, is refused when the trainer is built or before a fit reads data."""

import pytest
import torch
from composer import Callback
from composer.algorithms import LayerFreezing
from composer.utils import FSDPConfig, TPConfig
from composer_run import StopAt, make_trainer, run
from helpers import tiny_llama
from llmfoundry.callbacks import LayerFreezing as FreezingCallback

from apex_composer import APEX, StagewiseScheduler
from apex_composer.ops import dispatch as ops
from apex_composer.trainer.run_checks import check_expansion, check_run

QUERIES = "model.model.layers.0.self_attn.q_proj.weight"


class Refusing(Callback):
    """One of this package's callbacks, as far as `check_fit` is concerned."""

    def check_fit(self, state):
        raise ValueError("not with this data")


class Batches(torch.utils.data.Dataset):
    """Counts what is read of it."""

    read = 0

    def __len__(self):
        return 32

    def __getitem__(self, index):
        self.read += 1
        ids = torch.full((8,), index)
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def loader():
    return torch.utils.data.DataLoader(Batches(), batch_size=4)


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (["4ba", "4ba"], "longer than training .max_duration 6ba"),
        (["1ba"], "shorter than training"),
        (["10tok"], "got 10tok, but max_duration is 6ba"),
        (["1ep", "1ep"], r"\['8ba', '16ba'\], which is longer than"),
    ],
)
def test_stages_that_do_not_fill_the_run_are_refused_when_it_is_built(stages, told):
    with pytest.raises(ValueError, match=f"^stages: .*{told}"):
        make_trainer(APEX(stages=stages))


def test_a_duration_that_comes_with_fit_is_checked_there(loader):
    trainer = make_trainer(APEX(stages=["4ba", "4ba"]), loader=loader, max_duration=None)
    with pytest.raises(ValueError, match="^stages: .*longer than training"):
        trainer.fit(duration="6ba")
    assert loader.dataset.read == 0


def test_stages_without_a_duration_are_refused_by_the_scheduler():
    with pytest.raises(ValueError, match="^max_duration: not given, but stages are laid over it"):
        make_trainer(schedulers=StagewiseScheduler(), max_duration=None)


def test_callbacks_refuse_before_the_first_assessment_reads_data(loader):
    trainer = make_trainer(APEX(), loader=loader, callbacks=(Refusing(),))
    with pytest.raises(ValueError, match="not with this data"):
        trainer.fit()
    assert loader.dataset.read == 0


def test_other_rates_for_a_trained_stage_are_refused_before_data_is_read(tmp_path, loader):
    """Also where the stage has to begin anew with an assessment."""
    stages = ["2ba", "4ba"]
    scheduler = StagewiseScheduler(stages, lr_multipliers=[1.0, 0.4])
    saved = {"save_folder": str(tmp_path), "save_interval": "3ba"}
    run(APEX(stages=stages), schedulers=scheduler, **saved)
    trainer = make_trainer(
        APEX(stages=stages),
        loader=loader,
        schedulers=StagewiseScheduler(stages, lr_multipliers=[0.5, 0.4]),
        load_path=str(tmp_path / "ep0-ba3-rank0.pt"),
        load_ignore_keys=["state/algorithms*"],
    )
    with (
        pytest.warns(UserWarning, match="loaded without the state of apex"),
        pytest.raises(ValueError, match="lr x lr_multipliers: stage 0 has begun"),
    ):
        trainer.fit()
    assert loader.dataset.read == 0


def test_a_branch_without_its_parent_is_refused_when_the_run_is_built():
    """Before an evaluation that comes first (eval_first)."""
    point = {"parent": "p.pt", "sha256": "0", "batch": 3, "stage": 1, "changed": {}}
    with pytest.raises(ValueError, match="starts at batch 0, without a state of apex"):
        make_trainer(APEX(branch=point))


def test_freezing_layers_is_refused_when_the_run_is_built():
    with pytest.raises(ValueError, match="^algorithms: got layer_freezing"):
        make_trainer(APEX(), LayerFreezing())
    with pytest.raises(ValueError, match=f"^callbacks: layer_freezing freezes {QUERIES}"):
        make_trainer(APEX(), callbacks=(FreezingCallback([QUERIES]),))


def test_a_weight_that_is_not_trained_is_refused_when_the_run_is_built():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.requires_grad = False
    told = "layers.1.mlp.up_proj.weight is not trained by the optimizer"
    with pytest.raises(ValueError, match=told):
        make_trainer(APEX(), model=model)


@pytest.mark.parametrize("same", [True, False])
def test_a_second_apex_in_a_run_is_refused(same):
    """Composer's checkpoints tell algorithms apart by their class, so one would be lost."""
    first = APEX(targets=["head"])
    with pytest.raises(ValueError, match="^algorithms: got apex 2 times, allowed: once"):
        make_trainer(first, first if same else APEX(targets=["channel"]))


@pytest.mark.parametrize("fits", [0, 1])
def test_a_precision_that_comes_with_fit_is_checked_there(fits, loader, monkeypatch):
    monkeypatch.setattr("composer.trainer.trainer._validate_precision", lambda *_: None)
    trainer = make_trainer(APEX(stages=1), loader=loader, callbacks=(StopAt(1),))
    for _ in range(fits):
        trainer.fit()
    read, trainer.state.max_duration = loader.dataset.read, "6ba"
    with pytest.raises(ValueError, match="^precision: got amp_fp16"):
        trainer.fit(precision="amp_fp16")
    assert loader.dataset.read == read


def test_freezing_what_is_not_expanded_is_allowed():
    run(APEX(targets=["channel"]), callbacks=(FreezingCallback([QUERIES]),), max_duration="3ba")
    run(APEX(expansion=False), LayerFreezing(), max_duration="3ba")


def test_other_stages_than_the_schedulers_are_refused():
    ends = r"stagewise ends them at \['3ba', '6ba'\], the algorithm apex at \['2ba', '4ba', '6ba'\]"
    with pytest.raises(ValueError, match=f"^stages: the scheduler {ends}: give both the same"):
        make_trainer(APEX(stages=3), schedulers=StagewiseScheduler(2, lr_multipliers=[1, 1]))
    same = StagewiseScheduler(["3ba", "0.5dur"], lr_multipliers=[1, 1])
    make_trainer(APEX(stages=2), schedulers=same)


def test_other_stages_of_a_scheduler_that_comes_with_fit_are_refused(loader):
    trainer = make_trainer(APEX(stages=3), loader=loader)
    with pytest.raises(ValueError, match="^stages: the scheduler stagewise ends them at"):
        trainer.fit(schedulers=StagewiseScheduler(2, lr_multipliers=[1, 1]))
    assert loader.dataset.read == 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"heads": 1, "kv_heads": 1}, "rounds to a selection of nothing"),
        ({"dtype": torch.bfloat16}, "bfloat16.*master_weights_dtype"),
    ],
)
def test_a_model_that_cannot_be_expanded_is_refused_when_the_run_is_built(changed, told):
    with pytest.raises(ValueError, match=told):
        make_trainer(APEX(), model=tiny_llama(**changed))


def test_a_model_without_the_targets_is_refused_when_the_run_is_built():
    headless = tiny_llama()
    for layer in headless.model.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="targets: .*no sites of channel"):
        make_trainer(APEX(), model=headless)


def test_ways_of_sharding_that_apex_does_not_know_are_refused():
    trainer = make_trainer()
    trainer.state.fsdp_config = FSDPConfig(use_orig_params=False)
    with pytest.raises(ValueError, match="use_orig_params: got false.*allowed"):
        check_run(trainer.state)
    trainer.state.fsdp_config, trainer.state.tp_config = FSDPConfig(), TPConfig()
    with pytest.raises(ValueError, match="tp_config: .*allowed with apex: FSDP"):
        check_run(trainer.state)


@pytest.mark.parametrize("stages", [3, 7], ids=["not the algorithm's", "more than batches"])
def test_a_trainer_that_cannot_be_built_leaves_an_ordinary_model_at_once(stages):
    """Not only when Python comes round to it: the next trainer may have the model by then."""
    model, scheduler = tiny_llama(layers=1), StagewiseScheduler(stages, [1.0] * stages)
    with pytest.raises(ValueError, match="stages: "):
        make_trainer(APEX(stages=2, fused_swiglu=True), model=model, schedulers=scheduler)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_kernels_that_cannot_run_are_refused_at_init(monkeypatch):
    monkeypatch.setattr("apex_composer.triton_kernels.tiles.LARGEST_BLOCK", 3)
    ops.resolve_monarch.cache_clear()
    with pytest.raises(ValueError, match="got triton, but the kernels take blocks of up to 3, not"):
        make_trainer(APEX(implementation="triton"))
    ops.resolve_monarch.cache_clear()


def test_kernels_for_weights_that_will_be_sharded_are_refused_at_init(monkeypatch):
    trainer = make_trainer()
    trainer.state.fsdp_config = FSDPConfig()
    check_expansion(trainer.state, [], "triton")  # a single rank
    monkeypatch.setattr("apex_composer.trainer.run_checks.dist.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="got triton, but .*sharded weights"):
        check_expansion(trainer.state, [], "triton")
    check_expansion(trainer.state, [], "auto")
    trainer.state.fsdp_config = FSDPConfig(sharding_strategy="NO_SHARD")
    check_expansion(trainer.state, [], "triton")
