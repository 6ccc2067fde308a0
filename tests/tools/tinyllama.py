"""The sizes of TinyLLaMA-1.1B, as its config.json has them."""

import io
from pathlib import Path

from rich.console import Console

from apex_composer.tools.plan_tables import make_plan_tables
from apex_composer.tools.training_yaml import load_configuration

YAMLS = Path(__file__).parents[2] / "yamls"
TINYLLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def run_of(algorithms: dict, model: str, **settings) -> dict:
    """TinyLLaMA's baseline with other algorithms and settings of the model."""
    config = load_configuration(YAMLS / "tinyllama_vanilla.yaml", [model])
    model_settings = config["model"] | settings
    return config | {"algorithms": algorithms, "model": model_settings, "fsdp_config": None}


def lines_of(plan) -> str:
    """Its tables, as the terminal shows them."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*make_plan_tables(plan, "h100-sxm", 0.4))
    return console.export_text()
