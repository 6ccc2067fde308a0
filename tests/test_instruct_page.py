"""docs/instruct.md says what the YAMLs say, and what `apex-composer plan` computes."""

from pathlib import Path

from instruct_run import LOADERS, MODELS, YAMLS, load
from omegaconf import OmegaConf
from rich.filesize import decimal
from test_instruct_yamls import SHAPES
from transformers import LlamaConfig

from apex_composer.callbacks.start_checks import weight_bytes
from apex_composer.tools.model_size import row_memory
from apex_composer.tools.plan import make_plan
from apex_composer.tools.training_yaml import load_configuration

PAGE = (Path(__file__).parents[1] / "docs" / "instruct.md").read_text()


def test_the_page_and_the_yamls_have_the_same_loaders():
    block = PAGE.split("```yaml\n")[1].split("```")[0]
    page = OmegaConf.to_container(OmegaConf.create(block), resolve=True)
    for name in LOADERS:
        assert page[name] == load("instruct/llama2_7b_full")[name]
    assert page["tokenizer"] == load("instruct/llama2_7b_full")["tokenizer"]


MODES = {"full fine-tuning": "full", "half": "apex", "selected": "apex_selected"}


def planned(model: str, mode: str, folder: Path) -> list[str]:
    """What `apex-composer plan` says of a YAML, as the page's table has it."""
    yaml = YAMLS / "instruct" / f"{model}_{MODES[mode]}.yaml"
    overrides = [f"variables.model={folder / model}", f"variables.data={folder}"]
    config = load_configuration(yaml, overrides)
    plan = make_plan(config, gpus=8)
    size, cost = plan.parameters, plan.cost
    trained = size if cost is None else cost.share.trained
    memory = []
    for gpus in (1, 8):
        if cost is None:
            memory.append(16 * size // gpus)
        else:
            width = weight_bytes(config)
            parts = row_memory(cost, size, width, gpus, shards=gpus)
            memory.append(sum(parts.values()) + cost.memory)
    sizes = [decimal(number) for number in (*memory, plan.checkpoints.size)]
    return [mode, f"{trained:,}", f"{trained / size:.3%}", *sizes]


def test_the_page_has_the_numbers_of_plan(tmp_path):
    for model, shape in SHAPES.items():
        LlamaConfig(**shape, max_position_embeddings=8192).save_pretrained(tmp_path / model)
    table = PAGE.partition("| model | trained |")[2].partition("\n\n")[0].splitlines()[2:]
    expected = [planned(model, mode, tmp_path) for model in MODELS for mode in MODES]
    assert [[cell.strip() for cell in row.split("|")[2:-1]] for row in table] == expected
