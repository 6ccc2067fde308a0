"""LoRA, DoRA, rsLoRA and PiSSA of peft, as llm-foundry's `model.peft_config` trains them."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from composer import Trainer
from composer.models import HuggingFaceModel
from composer_run import assert_same_weights
from helpers import TokenDataset
from llmfoundry.callbacks import HuggingFaceCheckpointer
from llmfoundry.utils.builders import build_composer_model
from lora_runs import checkpoint, weights
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from tiny_run import SEQUENCE, write_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apex_composer.methods.lora_restart import adapters

LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": "all-linear",
}
METHODS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
# Two Llama layers in float32, whose products are taken in another order: each logit is a sum of
# some hundred terms that float32 rounds to 6e-8.
LOGITS_BOUND = 1e-5
IDS = TokenDataset(2, SEQUENCE, seed=5).ids


@cache
def base_folder() -> Path:
    """A two-layer Llama with its tokenizer."""
    folder = Path(mkdtemp(prefix="apex-test-lora-"))
    torch.manual_seed(0)
    write_model(folder)
    return folder


def build(settings: dict, whole: bool = False, seed: int = 1, **options) -> HuggingFaceModel:
    """What llm-foundry makes of a YAML's `model`."""
    model = {
        "pretrained_model_name_or_path": str(base_folder()),
        "pretrained": True,
        "peft_config": LORA | settings,
        "should_save_peft_only": not whole,
    }
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    return build_composer_model("hf_causal_lm", model, tokenizer, **options)


def train(model: HuggingFaceModel, **options) -> dict[str, torch.Tensor]:
    """Four batches; the weights."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TokenDataset(16, SEQUENCE), batch_size=4),
        optimizers=torch.optim.AdamW(trained, 1e-2),
        max_duration="4ba",
        save_interval="2ba",
        device="cpu",
        seed=17,
        progress_bar=False,
        **options,
    )
    trainer.fit()
    trainer.close()
    return weights(model)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def plain_base() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(base_folder())


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_trained_and_nothing_else(method):
    model = build(METHODS[method])
    before, after = weights(model), train(model)
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == ("lora_" not in name), name
    magnitudes = sum("lora_magnitude_vector" in name for name in after)
    assert magnitudes == (14 if method == "dora" else 0)
    for name, weight in plain_base().state_dict().items():
        for wrapped in (name, name.replace(".weight", ".base_layer.weight")):
            found = before.get(f"model.base_model.model.{wrapped}")
            if found is not None:
                changes = method == "pissa" and "base_layer" in wrapped
                assert torch.equal(found, weight) != changes, name
    scalings = {layer.scaling[own] for _, layer, own in adapters(model)}
    assert scalings == {8 / 4**0.5 if method == "rslora" else 8 / 4}


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ({"intermediate_size": 11008, "vocab_size": 32000}, 0.024),
        ({"intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8}, 0.021),
    ],
    ids=["LLaMA-2-7B", "LLaMA-3.1-8B"],
)
def test_rank_64_is_the_papers_share_of_the_base(shape, share):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, num_hidden_layers=32, **shape))
        base = sum(parameter.numel() for parameter in model.parameters())
        config = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    trained, _ = model.get_nb_trainable_parameters()
    assert round(trained / base, 3) == share


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_what_they_are_told_to_and_runs_go_on_bit_for_bit(method, whole, tmp_path):
    trained = train(build(METHODS[method], whole), save_folder=str(tmp_path))
    path = checkpoint(tmp_path, 2)
    saved = torch.load(path, weights_only=False)["state"]["model"]
    assert saved.keys() == {name for name in trained if whole or "lora_" in name}
    assert_same_weights(train(build(METHODS[method], whole), load_path=path), trained)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_the_export_is_an_adapter_of_the_untouched_base(method, whole, tmp_path):
    model = build(METHODS[method], whole)
    exporter = HuggingFaceCheckpointer(str(tmp_path), "1dur", precision="float32")
    trained = train(model, callbacks=[exporter])
    folder = tmp_path / "huggingface" / "ba4"
    exported = load_peft_weights(str(folder), device="cpu")
    assert len(exported) == sum("lora_" in name for name in trained)  # whatever `whole` says
    assert not (folder / "model.safetensors").exists()
    own = logits(model.model)
    adapted = PeftModel.from_pretrained(plain_base(), folder)
    assert error(logits(adapted), own) < LOGITS_BOUND
    assert error(logits(adapted.merge_and_unload()), own) < LOGITS_BOUND
    assert error(logits(plain_base()), own) > 1e-2


def test_pissa_lost_its_base_if_it_saved_adapters_only(tmp_path):
    """What `start_guard` refuses: the base is decomposed anew, from other random numbers."""
    settings = {"init_lora_weights": "pissa_niter_1"}

    for whole in (False, True):
        folder = tmp_path / str(whole)
        trained = train(build(settings, whole), save_folder=str(folder))
        path = checkpoint(folder, 2)
        resumed = train(build(settings, whole, seed=2), load_path=path)
        same = [torch.equal(resumed[name], weight) for name, weight in trained.items()]
        assert all(same) == whole


def test_an_exported_pissa_adapter_is_not_one_of_the_untouched_base(tmp_path):
    """A reader that does not decompose the base again, as servers of adapters do not."""
    model = build(METHODS["pissa"], whole=True)
    train(model, callbacks=[HuggingFaceCheckpointer(str(tmp_path), "1dur", precision="float32")])
    folder, own = tmp_path / "huggingface" / "ba4", logits(model.model)
    config = LoraConfig.from_pretrained(folder)
    config.init_lora_weights = True
    adapted = PeftModel.from_pretrained(plain_base(), folder, config=config)
    assert error(logits(adapted), own) > 1e-2
    assert error(logits(model.model.merge_and_unload()), own) < LOGITS_BOUND


def test_a_short_dtype_of_the_weights_is_the_adapters_too():
    """Why `start_guard` refuses it: AdamW would round most steps away."""
    model = build({}, master_weights_dtype="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
