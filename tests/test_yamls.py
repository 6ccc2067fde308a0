import random
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from composer.loggers import InMemoryLogger
from corpus import write_jsonl
from llmfoundry.command_utils import train
from tiny_run import SEQUENCE, VOCABULARY, composer, write_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from apex_composer import APEX
from apex_composer.data_prep import Options, read_manifest
from apex_composer.data_prep.__main__ import app
from apex_composer.data_prep.choose.budgets import wanted_tokens
from apex_composer.data_prep.options import parse_amount
from apex_composer.data_prep.read.domains import LLAMA1
from apex_composer.tools.training_yaml import load_configuration
from apex_composer.tools.yaml_defaults import read_yaml

ROOT = Path(__file__).parents[1]
YAMLS = ROOT / "yamls"
DOMAINS = ("cc", "c4", "github", "book", "wikipedia", "arxiv", "stackexchange")
NAMES = ("tinyllama_apex", "tinyllama_vanilla", "tinyllama_vanilla_constant")
# Options in which the documented commands may differ: where things are, and which machine works.
PLACES = {"--out", "--tokenizer", "--workers", "--shard", "--engine", "--address"}
# What budgets are divided by for a test: sequences have 16 tokens in place of 4096.
IN_SMALL = {"--val-tokens": 1000, "--train-tokens": 10**6, "--cpt-tokens": 10**6}


def load(name: str) -> dict:
    """A YAML as llm-foundry sees it after interpolation."""
    return load_configuration(YAMLS / f"{name}.yaml")


def flatten(value, path: str = "") -> dict:
    """Every leaf of nested mappings and lists by its dotted path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    leaves = {}
    for key, item in items:
        leaves |= flatten(item, f"{path}.{key}" if path else str(key))
    return leaves or {path: value}


def differing(first: dict, second: dict) -> set[str]:
    """Dotted paths whose values are not equal, or that only one of the two has."""
    one, other = flatten(first), flatten(second)
    missing = object()
    return {key for key in one | other if one.get(key, missing) != other.get(key, missing)}


NAMES_AND_FOLDERS = {"run_name", "save_folder", "callbacks.hf_checkpointer.save_folder"}


def test_apex_and_vanilla_differ_in_apex_and_names_only():
    apex, vanilla = load("tinyllama_apex"), load("tinyllama_vanilla")
    assert apex["algorithms"].pop("apex")
    assert list(apex["algorithms"]) == list(vanilla["algorithms"])
    assert differing(apex, vanilla) == NAMES_AND_FOLDERS


def test_vanilla_and_constant_differ_in_multipliers_and_names_only():
    vanilla, constant = load("tinyllama_vanilla"), load("tinyllama_vanilla_constant")
    assert vanilla["scheduler"].pop("lr_multipliers") == [1.0, 0.4, 0.1]
    assert constant["scheduler"].pop("lr_multipliers") == [1.0, 1.0, 1.0]
    assert differing(vanilla, constant) == NAMES_AND_FOLDERS


def test_the_settings_are_the_papers():
    config = load("tinyllama_apex")
    assert config["algorithms"]["apex"]["threshold"] == 0.125
    assert config["algorithms"]["apex"]["assessment"]["tokens"] == 30_000_000
    assert config["algorithms"]["apex"]["stages"] == ["10000ba"] * 3
    assert (config["max_seq_len"], config["global_train_batch_size"]) == (4096, 64)
    assert config["max_duration"] == "30000ba"
    rates = [config["optimizer"]["lr"] * k for k in config["scheduler"]["lr_multipliers"]]
    assert rates == pytest.approx([1e-4, 4e-5, 1e-5])


@pytest.mark.parametrize("name", NAMES)
def test_domains_are_local_and_have_llama_1_proportions(name):
    config = load(name)
    streams = config["train_loader"]["dataset"]["streams"]
    assert tuple(streams) == DOMAINS
    assert [stream["proportion"] for stream in streams.values()] == [67, 15, 4.5, 4.5, 4.5, 2.5, 2]
    assert tuple(loader["label"] for loader in config["eval_loader"]) == DOMAINS
    datasets = [*streams.values(), *(loader["dataset"] for loader in config["eval_loader"])]
    assert all(dataset["remote"] is None for dataset in datasets)


@pytest.mark.parametrize("name", NAMES)
def test_autoresume_has_what_it_needs(name):
    config = load(name)
    assert config["autoresume"] is True
    assert config["run_name"] and config["save_folder"]
    assert not config.get("save_overwrite", False)


def documented_commands() -> list[dict[str, str]]:
    """Options of every `apex-composer prep` command on the pages about it."""
    pages = [(ROOT / page).read_text() for page in ("README.md", "data_prep/README.md")]
    blocks = re.findall(r"^```bash\n(.*?)^```", "".join(pages), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines if line.startswith("apex-composer prep ")]
    return [dict(zip(words[3::2], words[4::2], strict=True)) for words in found]


def test_the_documented_commands_are_one():
    commands = documented_commands()
    assert len(commands) >= 3
    for name in {name for options in commands for name in options} - PLACES:
        assert len({options.get(name) for options in commands}) == 1, name
    assert load("tinyllama_apex")["variables"]["data"] == commands[0]["--out"]
    assert int(commands[0]["--seq-len"]) == load("tinyllama_apex")["max_seq_len"]


@pytest.mark.parametrize("name", NAMES)
def test_no_domain_is_drawn_twice_from_what_the_documented_command_writes(name):
    options = {
        key: parse_amount(v) for key, v in documented_commands()[0].items() if "tokens" in key
    }
    budget = Options(val_tokens=options["--val-tokens"], train_tokens=options["--train-tokens"],
                     proportions=LLAMA1)  # fmt: skip
    written, config = wanted_tokens(budget, list(DOMAINS))["train"], load(name)
    batches = int(config["max_duration"].removesuffix("ba"))
    drawn = batches * config["global_train_batch_size"] * config["max_seq_len"]
    for domain, stream in config["train_loader"]["dataset"]["streams"].items():
        assert stream["proportion"] / 100 * drawn <= written[domain]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a tiny model in `model` and what the documented command writes in `data`."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    for number, domain in enumerate(DOMAINS):
        words = random.Random(number).choices([f"w{n}" for n in range(VOCABULARY - 1)], k=20_000)
        texts = [" ".join(words[start : start + 25]) for start in range(0, len(words), 25)]
        write_jsonl(folder / "text" / domain / "x.jsonl", texts)
    options = documented_commands()[0]
    small = {name: parse_amount(value) for name, value in options.items() if "tokens" in name}
    small |= {name: value // IN_SMALL[name] for name, value in small.items()}
    small |= {"--seq-len": SEQUENCE, "--tokenizer": folder / "model", "--out": folder / "data"}
    arguments = [str(part) for pair in (options | small).items() for part in pair]
    result = CliRunner().invoke(app, ["prep", str(folder / "text"), *arguments, "--workers", "1"])
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_reads_all_that_the_documented_command_writes(name, inputs):
    config = load_configuration(YAMLS / f"{name}.yaml", [f"variables.data={inputs / 'data'}"])
    read = [stream["local"] for stream in config["train_loader"]["dataset"]["streams"].values()]
    read += [loader["dataset"]["local"] for loader in config["eval_loader"]]
    manifest = read_manifest(inputs / "data")
    written = {str(inputs / "data" / stream) for stream in manifest["shards"]}
    assert set(read) == written and len(read) == 2 * len(DOMAINS)


def tiny_overrides(inputs: Path) -> dict:
    """What makes a YAML of the paper's size a run of three small batches on a CPU."""
    return {
        "variables.model": inputs / "model",
        "variables.data": inputs / "data",
        "variables.attention": "sdpa",  # flash_attention_2 needs a GPU
        "variables.stages": "[1ba,1ba,1ba]",
        "max_duration": "3ba",
        "max_seq_len": SEQUENCE,
        "global_train_batch_size": 4,
        "precision": "fp32",  # the only one that Composer has on CPUs
        "console_log_interval": "1ba",
    }


@pytest.mark.long
def test_random_weights_are_found_before_the_first_batch(inputs, tmp_path):
    """The YAML says that its model is pretrained; the tiny one's loss is that of its vocabulary."""
    arguments = [f"{key}={value}" for key, value in tiny_overrides(inputs).items()]
    arguments.append(f"algorithms.apex.assessment.tokens={SEQUENCE}")
    with pytest.raises(AssertionError, match=r"start_guard: the first loss is 4\.\d+"):
        composer(ROOT / "train.py", [YAMLS / "tinyllama_apex.yaml", *arguments], tmp_path)


@pytest.mark.parametrize("name", NAMES[:2])  # the third differs in numbers and names only
def test_yaml_runs_on_a_tiny_model(name, inputs, tmp_path):
    overrides = tiny_overrides(inputs) | {"callbacks.start_guard.margin": "null"}
    if name == "tinyllama_apex":
        overrides["algorithms.apex.assessment.tokens"] = 8 * SEQUENCE
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    log = composer(ROOT / "train.py", [YAMLS / f"{name}.yaml", *arguments], tmp_path)
    assert all(
        f"metrics/eval/{domain}/" in log.replace("eval/metrics", "metrics/eval")
        for domain in DOMAINS
    )
    run = tmp_path / "runs" / load(name)["run_name"]
    assert (run / "checkpoints" / "latest-rank0.pt").exists()
    trained = AutoModelForCausalLM.from_pretrained(run / "huggingface" / "ba3")
    untrained = AutoModelForCausalLM.from_pretrained(inputs / "model").state_dict()
    weights = trained.state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in untrained.items()}
    assert trained.config.max_position_embeddings == SEQUENCE
    assert any(not torch.equal(weights[key], untrained[key]) for key in weights)


@pytest.mark.filterwarnings("ignore:tokenizer. its padding token")  # of the tiny model's
@pytest.mark.parametrize(
    "stages", [1, 4, *(pytest.param(number, marks=pytest.mark.long) for number in (2, 3))]
)
def test_the_ablations_of_stages_run_on_a_tiny_model(stages, inputs, tmp_path):
    overrides = tiny_overrides(inputs) | {
        "variables.stages": stages,
        "variables.runs": tmp_path,
        "max_duration": f"{stages}ba" if stages > 1 else "2ba",
        "algorithms.apex.assessment.tokens": SEQUENCE,
        "train_loader.num_workers": 0,
        "train_loader.prefetch_factor": "null",
        "train_loader.persistent_workers": "false",
        "eval_loader": "null",
        "eval_first": "false",
        "callbacks.start_guard.margin": "null",
        "callbacks.heartbeat": "null",
        "callbacks.speed_monitor.window_size": 1,
        "loggers": "{inmemory: {}}",
        "log_to_console": "false",
        "python_log_level": "null",
    }
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    name = f"ablation/tinyllama_stages_{stages}"
    trainer = train(read_yaml(YAMLS / f"{name}.yaml", arguments))
    trainer.close()
    (apex,) = (a for a in trainer.state.algorithms if isinstance(a, APEX))
    assert [record["stage"] for record in apex.history] == list(range(stages))
    assert (tmp_path / load(name)["run_name"] / "huggingface").is_dir()
    # What a utilisation is made of; of a CPU no peak is known.
    (logged,) = (one for one in trainer.logger.destinations if isinstance(one, InMemoryLogger))
    assert all(flops > 0 for _, flops in logged.data["throughput/device/flops_per_sec"])
    assert "throughput/device/mfu" not in logged.data


def test_yamls_are_plain_yaml():
    # Other tools read them too: no tags and nothing that only OmegaConf's loader accepts.
    for path in YAMLS.rglob("*.yaml"):
        assert yaml.safe_load(path.read_text())
