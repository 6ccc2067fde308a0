"""`apex-composer plan` on this project's YAMLs."""

import re
from pathlib import Path

import pytest
import yaml
from tiny_run import SEQUENCE, write_shards
from typer.testing import CliRunner

from apex_composer.cli import app
from apex_composer.tools.plan import make_plan
from apex_composer.tools.plan_tables import peak_flops
from apex_composer.tools.training_yaml import load_configuration

YAMLS = Path(__file__).parents[2] / "yamls"
APEX_YAML = YAMLS / "tinyllama_apex.yaml"
pytestmark = pytest.mark.usefixtures("roomy_disk")


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setattr("apex_composer.tools.commands.console._width", 200)

    def call(*arguments):
        result = CliRunner().invoke(
            app, ["plan", *(str(argument) for argument in arguments)], catch_exceptions=False
        )
        return result.exit_code, result.output

    return call


def test_the_papers_run(invoke, model):
    status, text = invoke(APEX_YAML, model)
    assert status == 0, text
    for told in (
        "10,000ba │ 2.62 B │        0.0001 │       yes",
        "30,000ba │ 2.62 B │         1e-05 │       yes",
        "Time: 8 x h100-sxm",
        "ASSUMED utilisation of",
        "1,100,048,384",
        "13.2 GB each, 30 written, 3 at a time, 39.6 GB in runs/tinyllama-apex/checkpoints",
        "channels │     22 │            5,632 │      704",
        "110 with 2,869,504 parameters",
        r"FLOPs  *│ 2.208e\+15 a batch, 26.3% of it attention's",
        r"FLOPs: fold  *│ 2.82e\+15 of the run .0.00426% of training's",
        r"FLOPs: first assessment  *│ 8.42e\+16 of the run",
        "FLOPs in all  *│ 1.00146 times",
        "not on this machine",
    ):
        assert re.search(told, text), (told, text)


def test_what_apex_adds_is_counted_by_hand(model):
    """The numbers in the docstring of operators/flops.py."""
    plan = make_plan(load_configuration(APEX_YAML, [model]), 1)
    weights = 1_100_048_384 - 2048 * 32000 - 45 * 2048
    forward = 2 * weights + 4 * 22 * 2048 * 4096  # for each token
    assert (plan.step_flops, plan.tokens) == (3 * forward * 64 * 4096, 30_000 * 64 * 4096)
    operators = [(256, 2048, 16, 16)] * 2 + [(704, 2048, 22, 32)] * 3  # n, d, p, q of a layer
    fold = 22 * sum(2 * n * d * (p + q) for n, d, p, q in operators)
    mapped = 22 * sum(2 * n * d * (2 * p + 3 * q) for n, d, p, q in operators)
    added, norms = plan.added, 22 * 2 * (2048 + 5632)
    assert (added.fold, added.gradient_map) == (30_000 * fold, 30_000 * mapped)
    assert added.norms == norms * (plan.tokens + 30_000_000)
    assert added.first_assessment == 30_000_000 * forward
    own = 30_000 * plan.step_flops
    assert (added.fold + added.gradient_map) / own == pytest.approx(2e-5, rel=0.06)
    assert added.norms / own == pytest.approx(4e-5, rel=0.02)
    assert added.first_assessment / own == pytest.approx(0.00127, rel=0.01)
    assert 6 * plan.cost.parameters / (3 * forward) == pytest.approx(0.0020, rel=0.03)
    eight = make_plan(load_configuration(APEX_YAML, [model]), 8)
    assert eight.added.fold == 8 * added.fold  # every replica folds
    sharded = load_configuration(APEX_YAML, [model, "fsdp_config={state_dict_type: full}"])
    assert make_plan(sharded, 8).added.fold == added.fold
    rest = "algorithms.apex.assessment={method: random}", "algorithms.apex.expansion=false"
    none = make_plan(load_configuration(APEX_YAML, [model, *rest]), 8)
    assert none.added.total == 0


def test_the_vanilla_run_has_no_operators(invoke, model):
    status, text = invoke(YAMLS / "tinyllama_vanilla.yaml", model, "--gpu", "a100", "--mfu", "0.5")
    assert status == 0
    assert "4e-05 │        no" in text and "APEX adds" not in text and "8 x a100" in text


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"t_warmup": "100ba", "t_decay": "0.1dur", "alpha_f": 0.2}, (0, 1e-4, 2e-5)),
        ({"t_decay": "1000ba", "t_cycle": "15000ba"}, (1e-4, 0, 1e-4, 0)),
        ({"t_decay": "1ep"}, ()),  # only the data tells
    ],
)
def test_the_rates_of_a_decay(settings, rates):
    config = load_configuration(YAMLS / "tinyllama_vanilla.yaml", ["variables.model=/none"])
    plan = make_plan(config | {"scheduler": {"name": "wsd"} | settings}, 8)
    assert plan.stages[0].learning_rates == pytest.approx(rates)
    assert [stage.end for stage in plan.stages] == ["30,000ba"]


def test_a_decay_over_stages(invoke, model, tmp_path):
    config = load_configuration(APEX_YAML, [model])
    config["scheduler"] = {"name": "wsd", "t_decay": "15000ba", "decay": "linear"}
    (tmp_path / "wsd.yaml").write_text(yaml.safe_dump(config))
    status, text = invoke(tmp_path / "wsd.yaml")
    rates = re.findall(r"2.62 B │ +(.*?) │", text)
    assert status == 0 and rates == ["0.0001", "0.0001 → 6.66667e-05", "6.66667e-05 → 0"]
    status, text = invoke(tmp_path / "wsd.yaml", "scheduler.t_decay=40000ba")
    assert status == 1 and "t_warmup, t_decay: got 0ba and 40000ba, together 40000ba" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "24"], "global_train_batch_size: got 64 for 24 GPUs"),
        (["max_duration=20000ba"], "stages: they end at .*longer than training"),
        (["scheduler.stages=[15000ba,5000ba,10000ba]"], "the scheduler stagewise ends them at"),
        (["algorithms.apex.treshold=0.1"], "apex: unknown key 'treshold'"),
        (["algorithms.apex.threshold=0.9"], "threshold: got 0.9"),
        (["optimzer.lr=1"], "unknown key 'optimzer'. Did you mean 'optimizer'"),
        (["max_seq_len=8192", "model.config_overrides=null"], "max_seq_len: got 8192"),
        (["--gpu", "h300"], "--gpu: got 'h300', allowed: a10"),
        (["precision=fp8x"], "precision .on h100-sxm.: got 'fp8x'"),
        (["save_num_checkpoints_to_keep=-1", "save_interval=100ba"], "300 checkpoints of 13.2 GB"),
        (["variables.model=/none"], "'/none' gives no configuration"),
    ],
)
def test_trouble_is_named_and_the_status_says_so(invoke, model, arguments, told):
    status, text = invoke(APEX_YAML, model, *arguments)
    assert status == 1
    assert re.search(f"problem: .*{told}", text), text


def test_packing_that_start_guard_would_refuse_is_a_problem(invoke, model):
    yaml = YAMLS / "instruct" / "llama31_8b_full.yaml"
    status, text = invoke(yaml, model, "train_loader.dataset.packing_ratio=2")
    assert status == 1 and "problem: train_loader.dataset.packing_ratio: got 2" in text


def test_a_yaml_that_is_not_there(invoke):
    status, text = invoke("none.yaml")
    assert status == 1 and "none.yaml does not exist" in text


def test_the_data_that_is_here_is_counted(model, tmp_path):
    write_shards(tmp_path, samples=24)
    overrides = [
        model,
        "train_loader.dataset.streams=null",
        f"train_loader.dataset.local={tmp_path}",
    ]
    config = load_configuration(APEX_YAML, [*overrides, f"max_seq_len={SEQUENCE}"])
    plan = make_plan(config, gpus=1)
    assert plan.data_tokens == 24 * SEQUENCE and plan.problems == []
    assert plan.tokens == 30_000 * 64 * SEQUENCE


def test_the_peaks_are_the_data_sheets():
    assert peak_flops("a100", "amp_bf16") == 312e12
    assert peak_flops("h100-sxm", "amp_bf16") == pytest.approx(989e12, rel=1e-3)
    assert peak_flops("h200-sxm", "amp_bf16") == pytest.approx(989e12, rel=1e-3)


ROWS = [
    "algorithms.apex.trainable=selected",
    "algorithms.apex.trainable_share=0.05",
    "model.master_weights_dtype=bf16",
    "fsdp_config=null",
]
HALF = ["algorithms.apex.trainable=half", "algorithms.apex.trainable_share=0.52"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--gpus", "1"],
            [
                r"rows only  *│ trained 5\d,\d+,\d+ of 1,100,048,384 parameters \(4\.\d+%\), thres",
                r"memory: weights  *│ 2.2 GB",
                r"memory: gradients of whole weights  *│ 23.1 MB",
                "each GPU .one GPU., with .* of operators; activations come on top",
            ],
        ),
        (["--gpus", "8"], [r"memory: gradients of whole weights  *│ 3\.\d GB", "each GPU .DDP."]),
        (
            ["--gpus", "8", "fsdp_config={state_dict_type: full}"],
            [r"memory: weights  *│ 275.0 MB", r"each GPU .FSDP2, FSDP_VERSION=2."],
        ),
        (
            [*HALF, "model.master_weights_dtype=null"],
            [r"memory: embeddings and head  *│ 1.6 GB", r"memory: rows.*│ 7.0 GB"],
        ),
        # In bf16 embeddings and head have copies, as rows: 131 M parameters of 16 bytes.
        (HALF, [r"memory: rows.*│ 9.1 GB"]),
    ],
)
def test_a_run_that_trains_rows(invoke, model, arguments, told):
    status, text = invoke(APEX_YAML, model, *ROWS, *arguments)
    assert status == 0, text
    for line in told:
        assert re.search(line, text), (line, text)


@pytest.mark.parametrize(
    ("sharding", "told"),
    [
        ("{}", r"optimizer +│ 1.1 GB on each GPU .FSDP, fp32"),
        (
            "{data_parallel_replicate_degree: 8}",
            r"optimizer +│ 8.8 GB on each GPU .FSDP over 2 of 16",
        ),
        ("{data_parallel_shard_degree: 4}", r"optimizer +│ 4.4 GB on each GPU .FSDP over 4 of 16"),
        ("{sharding_strategy: NO_SHARD}", r"optimizer +│ 17.6 GB on each GPU .DDP, fp32"),
    ],
)
def test_replicas_of_shards_hold_more_each(invoke, model, sharding, told):
    vanilla = YAMLS / "tinyllama_vanilla.yaml"
    status, text = invoke(vanilla, model, "--gpus", "16", f"fsdp_config={sharding}")
    assert status == 0 and re.search(told, text), text


def test_optimizers_and_weights_that_take_less_are_told(invoke, model):
    vanilla = YAMLS / "tinyllama_vanilla.yaml"
    _, text = invoke(vanilla, model, "optimizer.name=muon")
    assert re.search(r"17.6 GB on each GPU .DDP, fp32, muon counted as AdamW", text), text
    _, text = invoke(vanilla, model, "model.master_weights_dtype=bf16")
    assert re.search(r"8.8 GB on each GPU .DDP, weights of 16 bits", text), text
    assert "6.6 GB each" in text


def test_a_run_with_adapters(invoke, model):
    trained = 8 * 22 * (2 * 4096 + 2 * (2048 + 256) + 3 * (2048 + 5632))
    peft = "peft_type: LORA, task_type: CAUSAL_LM, r: 8, target_modules: all-linear"
    lora, whole = f"model.peft_config={{{peft}}}", "model.should_save_peft_only=false"
    vanilla = YAMLS / "tinyllama_vanilla.yaml"
    status, text = invoke(vanilla, model, lora)
    assert status == 0, text
    assert f"{trained:,} of {1_100_048_384 + trained:,} parameters (0.570%)" in text, text
    assert re.search(r"optimizer +│ 4.5 GB on each GPU .DDP", text), text
    assert "75.7 MB each, 30 written" in text, text
    assert "4.5 GB each, 30 written" in invoke(vanilla, model, lora, whole)[1]
    status, text = invoke(vanilla, model, lora, "algorithms={relora: {}}")
    assert status == 1 and "should_save_peft_only: got true with algorithms: relora" in text


def test_a_share_that_cannot_be_met_is_a_problem(invoke, model):
    status, text = invoke(APEX_YAML, model, *ROWS, "algorithms.apex.trainable_share=0.005")
    assert status == 1
    assert re.search("problem: trainable_share: got 0.005, which cannot be met within 10 %", text)
