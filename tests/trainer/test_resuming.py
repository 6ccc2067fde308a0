"""Staged runs: extended, continued stage by stage, changed where that is allowed, and branched."""

from pathlib import Path

import pytest
from composer import Callback
from composer_run import assert_same_weights, make_trainer
from helpers import tiny_llama

from apex_composer import APEX, StagewiseScheduler
from apex_composer.trainer.resuming import check_branch, check_stages, trace
from apex_composer.trainer.stage_plan import StagePlan

MULTIPLIERS = [1.0, 0.4, 0.1]
STAGES = ["2ba", "3ba", "2ba"]
LR = 1e-2
BRANCH = {"parent": "p.pt", "sha256": "0", "batch": 3, "stage": 1, "changed": {}}


class Rates(Callback):
    """The learning rate that the optimizer has at every batch."""

    def __init__(self):
        self.seen = {}

    def batch_start(self, state, logger):
        group = state.optimizers[0].param_groups[0]
        self.seen[state.timestamp.batch.value] = group["lr"]


def train(count: int, *, until=None, multipliers=MULTIPLIERS, apex=None, lr=LR, **options):
    """Train the first `count` stages; returns the algorithm, weights and learning rates."""
    stages = options.pop("stages", STAGES[:count])
    total = sum(int(stage.removesuffix("ba")) for stage in stages)
    rates, apex = Rates(), apex or APEX(stages=stages)
    model = tiny_llama()
    trainer = make_trainer(
        apex,
        model=model,
        schedulers=StagewiseScheduler(stages=stages, lr_multipliers=multipliers[: len(stages)]),
        max_duration=f"{total}ba",
        callbacks=(rates,),
        lr=lr,
        **options,
    )
    trainer.fit()
    trainer.close()
    return apex, dict(model.state_dict()), rates.seen


def save(folder: Path, count: int, **options) -> Path:
    """Train the first `count` stages, checkpoints at every batch; returns the last one."""
    train(count, save_folder=str(folder), save_interval="1ba", **options)
    total = sum(int(stage.removesuffix("ba")) for stage in STAGES[:count])
    return folder / f"ep0-ba{total}-rank0.pt"


@pytest.fixture(scope="module")
def whole():
    """The three stages in one run."""
    return train(3)


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory) -> Path:
    """Checkpoints of a finished run of the first two stages: batches 1 to 5."""
    return save(tmp_path_factory.mktemp("two"), 2).parent


def test_one_run_per_stage_equals_the_single_run(whole, tmp_path):
    checkpoint, rates = None, {}
    for count in (1, 2, 3):
        options = {"load_path": str(checkpoint)} if checkpoint else {}
        folder = tmp_path / str(count)
        apex, weights, seen = train(count, save_folder=str(folder), save_interval="1dur", **options)
        (checkpoint,) = folder.glob("ep0-ba*")
        rates |= seen
    assert_same_weights(whole[1], weights)
    assert apex.history == whole[0].history
    assert [record["samples"] for record in apex.history] == [4, 8, 12]
    assert rates == whole[2]
    # Composer steps schedulers before its clock: a stage's rate arrives at its second batch.
    assert [rates[batch] for batch in range(7)] == pytest.approx(
        [LR * m for m in (1, 1, 1, 0.4, 0.4, 0.4, 0.1)]
    )


def test_an_appended_stage_trains_at_its_own_rate(two_stages):
    """The base rate changes too, so that every later rate is new while those trained are not."""
    _, _, seen = train(
        3, load_path=str(two_stages / "ep0-ba5-rank0.pt"), lr=2 * LR, multipliers=[0.5, 0.2, 0.7]
    )
    assert seen == pytest.approx({5: 0.4 * LR, 6: 1.4 * LR})


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_later_stages_may_change_and_begun_ones_may_not(two_stages, batch):
    checkpoint = str(two_stages / f"ep0-ba{batch}-rank0.pt")
    other_last = ["2ba", "1ba", "1ba"]
    if batch == 1:
        apex, _, seen = train(3, load_path=checkpoint, stages=other_last)
        assert [record["start_batch"] for record in apex.history] == [0, 2, 3]
    else:  # at batch 2 the second stage has begun, its operators exist
        with pytest.raises(ValueError, match=r"stages: .*'2ba', '5ba'\].*'2ba', '3ba', '4ba'"):
            train(3, load_path=checkpoint, stages=other_last)
    with pytest.raises(ValueError, match=r"stages: .*\['2ba'.*this run says \['3ba', '6ba'"):
        train(3, load_path=checkpoint, stages=["3ba", "3ba", "1ba"])


def test_stages_may_be_left_out(two_stages):
    apex, _, _ = train(1, load_path=str(two_stages / "ep0-ba1-rank0.pt"))
    assert [record["start_batch"] for record in apex.history] == [0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": 2 * LR}, r"lr x lr_multipliers: stage 0 .* 0\.01, this run says 0\.02"),
        ({"multipliers": [1, 0.5, 0.1]}, r"stage 1 .*0\.004, this run says 0\.005"),
    ],
)
def test_another_rate_for_a_trained_stage_is_refused(two_stages, options, told):
    with pytest.raises(ValueError, match=told):
        train(3, load_path=str(two_stages / "ep0-ba5-rank0.pt"), **options)


def test_what_may_change_within_a_stage_is_told(two_stages, recwarn):
    """And kept: a checkpoint says what its batches were trained with."""
    checkpoint = str(two_stages / "ep0-ba3-rank0.pt")

    def told(**settings) -> list[str]:
        recwarn.clear()
        train(3, apex=APEX(stages=STAGES, **settings), load_path=checkpoint)
        lines = [str(warning.message) for warning in recwarn]
        return [line for line in lines if "operator_lr_scale" in line or "interval" in line]

    assert told() == told(operator_lr_scale=1.0) == []
    assert told(operator_lr_scale=30, assessment={"interval": 3}) == [
        "operator_lr_scale: the checkpoint's run had 1.0, this run says 30.0, from here on; "
        "assessment.interval: the checkpoint's run had 1, this run says 3, from here on"
    ]


def test_a_rate_may_change_before_its_stage_has_begun(two_stages):
    """At batch 2 the second stage is set up, but no batch of it was trained at any rate."""
    _, _, seen = train(2, load_path=str(two_stages / "ep0-ba2-rank0.pt"), multipliers=[1, 0.5, 0.1])
    assert seen == pytest.approx({2: LR, 3: 0.5 * LR, 4: 0.5 * LR})


def branch(batch: int, **changed) -> dict:
    return {**BRANCH, "batch": batch, "changed": changed}


def test_a_branch_with_another_threshold_starts_its_stage_anew(two_stages, tmp_path):
    parent = two_stages / "ep0-ba3-rank0.pt"
    point = branch(3, threshold=[0.125, 0.25])
    apex = APEX(stages=STAGES, threshold=0.25, branch=point)
    train(3, apex=apex, load_path=str(parent), save_folder=str(tmp_path), save_interval="1ba")
    assert [(r["stage"], r["start_batch"]) for r in apex.history] == [
        (0, 0),
        (1, 2),
        (1, 3),
        (2, 5),
    ]
    units = [len(r["advantageous"]["model.model.layers.0.mlp.channels"]) for r in apex.history]
    assert units == [3, 3, 6, 6]
    assert apex.lineage == [point]
    # Killed and resumed, the branch goes on with its own state.
    again = APEX(stages=STAGES, threshold=0.25, branch=point)
    train(3, apex=again, load_path=str(tmp_path / "ep0-ba6-rank0.pt"))
    assert again.history == apex.history and again.lineage == [point]


def test_a_branch_with_another_rate_keeps_its_operators(two_stages):
    parent = two_stages / "ep0-ba3-rank0.pt"
    apex = APEX(stages=STAGES, branch=branch(3))
    _, _, seen = train(3, apex=apex, load_path=str(parent), multipliers=[1, 0.5, 0.2])
    assert [r["start_batch"] for r in apex.history] == [0, 2, 5]
    assert seen == pytest.approx({3: 0.4 * LR, 4: 0.5 * LR, 5: 0.5 * LR, 6: 0.2 * LR})


def test_a_branch_may_end_the_running_stage(two_stages):
    """At batch 3 of a stage up to 5: the branch lays out other stages, and one begins here."""
    stages = ["3ba", "2ba"]
    apex = APEX(stages=stages, branch=branch(3))
    train(2, apex=apex, stages=stages, load_path=str(two_stages / "ep0-ba3-rank0.pt"))
    assert [(r["stage"], r["start_batch"]) for r in apex.history] == [(0, 0), (1, 2), (1, 3)]


def test_a_branch_from_elsewhere_is_refused(two_stages):
    checkpoint = str(two_stages / "ep0-ba2-rank0.pt")
    with pytest.raises(ValueError, match="branches off at batch 3 of p.pt, but starts at batch 2"):
        train(3, apex=APEX(stages=STAGES, branch=branch(3)), load_path=checkpoint)
    with pytest.raises(ValueError, match="starts at batch 0, without a state of apex"):
        train(3, apex=APEX(stages=STAGES, branch=branch(3)))


def plan_of(*ends: int) -> StagePlan:
    return StagePlan("ba", ends, (True,) * len(ends))


def test_what_may_change():
    saved = plan_of(2, 5)
    check_stages(saved, plan_of(2, 4, 9), begun=1)
    check_stages(saved, plan_of(2, 5, 9), begun=2)
    check_stages(saved, plan_of(2), begun=1)
    check_stages(saved, StagePlan("tok", (7,), (True,)), begun=0)
    others = [StagePlan("ba", (2, 5), (True, False)), StagePlan("tok", (2, 5), (True, True))]
    for given in (plan_of(3), plan_of(2, 4), plan_of(2), *others):
        with pytest.raises(ValueError, match="apex-composer branch"):
            check_stages(saved, given, begun=2)


def test_a_branch_is_complete():
    assert check_branch(None) is None and check_branch(BRANCH) == BRANCH
    with pytest.raises(TypeError, match="branch: unknown key 'batches'. Did you mean 'batch'"):
        APEX(branch={"batches": 3})
    for wrong in ("p.pt", {"parent": "p.pt"}):
        with pytest.raises(ValueError, match="branch: got .*apex-composer branch"):
            APEX(branch=wrong)
    for wrong in ({"batch": 2.5}, {"batch": True}, {"stage": -1}, {"stage": "1"}):
        with pytest.raises(ValueError, match=f"branch: {next(iter(wrong))}: got .*an integer"):
            APEX(branch={**BRANCH, **wrong})
    for key in ("parent", "sha256"):
        for wrong in (3, None, ["p.pt"], Path("p.pt")):
            with pytest.raises(ValueError, match=f"branch: {key}: got .*, allowed: a string"):
                APEX(branch={**BRANCH, key: wrong})
    for wrong in (3, ["lr"], {"lr": 0.1}, {"lr": "ab"}, {"lr": [0.1]}):
        with pytest.raises(ValueError, match=r"branch: changed: got .*\[before, after\]"):
            APEX(branch={**BRANCH, "changed": wrong})


def test_lineage_grows_by_one_for_every_branch():
    other = {**BRANCH, "batch": 7}
    loaded = {"lineage": [BRANCH]}
    assert trace(None, None, 0) == ([], False)
    assert trace(None, loaded, 5) == ([BRANCH], False)
    assert trace(BRANCH, loaded, 5) == ([BRANCH], False)
    assert trace(other, loaded, 7) == ([BRANCH, other], True)
