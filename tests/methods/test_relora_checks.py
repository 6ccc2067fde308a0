"""Runs in which ReLoRA could not be exact, or would be lost, are refused."""

import pytest
from composer.algorithms import EMA
from composer.utils import FSDPConfig
from helpers import tiny_llama
from llmfoundry.callbacks import HuggingFaceCheckpointer
from lora_runs import lora_llama, make_lora_trainer
from pytorch_optimizer import ScheduleFreeAdamW

from apex_composer.methods.relora import ReLoRA

SETTINGS = {"interval": "3ba", "t_warmup": "2ba"}


@pytest.mark.parametrize(
    ("settings", "options", "told"),
    [
        ({"interval": "7ba"}, {}, "interval: got 7ba, allowed: less than the run's 7ba"),
        ({"t_warmup": "3ba"}, {}, "t_warmup: got 3ba, allowed: less than the interval"),
        ({"interval": "9tok"}, {}, "interval: got 9tok"),
        ({"interval": "0.5dur"}, {"max_duration": "99tok"}, "interval: got 0.5dur in a run of 99"),
        ({}, {"whole": False}, "should_save_peft_only: got true"),
        ({}, {"model": tiny_llama}, "model.peft_config: got none"),
        ({}, {"model": lambda: lora_llama(use_dora=True)}, "use_dora: got true"),
        ({}, {"fsdp": True}, "got FSDP1"),
        ({}, {"count": 2}, "relora more than once"),
        ({}, {"callbacks": "hf"}, "got hf_checkpointer.*apex-composer merge"),
    ],
)
def test_runs_that_could_not_be_exact_are_refused_when_the_trainer_is_built(
    settings, options, told, tmp_path
):
    options = {key: own() if key == "model" else own for key, own in options.items()}
    if options.get("callbacks") == "hf":
        options |= {"callbacks": [HuggingFaceCheckpointer(str(tmp_path), "1dur")]}
    if options.get("fsdp"):
        options = {"parallelism_config": {"fsdp": FSDPConfig()}}
    both = [ReLoRA(**SETTINGS | settings)] * options.pop("count", 1)
    with pytest.raises(ValueError, match=told):
        make_lora_trainer(*both, **options)


def test_what_keeps_other_weights_than_the_models_is_refused():
    model = lora_llama()
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="^optimizer: got ScheduleFreeAdamW, which keeps weights"):
        make_lora_trainer(ReLoRA(), model=model, optimizers=ScheduleFreeAdamW(trained, 1e-2))
    with pytest.raises(ValueError, match="^algorithms: got EMA with relora"):
        make_lora_trainer(ReLoRA(), EMA(half_life="2ba"))
