"""Models of every source open with the weights that they have, and leave nothing behind."""

import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from saved_runs import base_folder, load, noisy, save, save_sharded, tokenizer_of, wrapped
from test_mpt import make_mpt
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from apex_composer.evaluate.models import open_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where conversions go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_folder_is_opened_where_it_lies(base, temporary):
    with open_model(str(base), device="cpu") as opened:
        assert opened.folder == base and opened.name == str(base)
        assert not opened.model.training
        assert not any(one.requires_grad for one in opened.model.parameters())
        assert torch.equal(logits(opened.model), logits(load(base).eval()))
        assert opened.tokenizer.eos_token == "<eos>"
        assert not list(temporary.iterdir())
    assert base.is_dir()


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_a_checkpoint_becomes_a_temporary_folder(base, tmp_path, temporary, kind):
    model = noisy(load(base), 1)
    path = save(wrapped(model, tokenizer_of(base)), tmp_path / "ba1.pt")
    path = path if kind == "file" else save_sharded(path, tmp_path / "shards")
    with open_model(str(path), device="cpu", dtype="float64") as opened:
        assert opened.model.dtype == torch.float64
        assert torch.equal(logits(opened.model), logits(model.double().eval()))
        assert opened.folder.is_relative_to(temporary) and (opened.folder / "config.json").is_file()
    assert not list(temporary.iterdir())
    opened.close()


def test_attention_that_is_capped_is_not_left_to_sdpa(base, tmp_path):
    """Which transformers takes by default, and which has no cap; the logits differ by 1e-3."""
    model = tiny_model("gemma2", torch.float64)
    model.config.attn_logit_softcapping = 1.0
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 1.0
        layer.self_attn.q_proj.weight.data *= 30
    model.save_pretrained(tmp_path)
    tokenizer_of(base).save_pretrained(tmp_path)
    with open_model(str(tmp_path), device="cpu") as opened:
        assert opened.model.config._attn_implementation == "eager"
        assert torch.equal(logits(opened.model), logits(model))
        opened.model.config._attn_implementation = "sdpa"
        assert not torch.allclose(logits(opened.model), logits(model), atol=1e-4)


def test_adapters_become_part_of_the_weights(base, tmp_path, temporary):
    settings = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "up_proj"]}
    adapted = wrapped(load(base), tokenizer_of(base), peft_config=LoraConfig(**settings))
    noisy(adapted.model, 1)
    path = save(adapted, tmp_path / "ba1.pt")
    expected = logits(adapted.model.eval())
    # What hf_checkpointer exports; peft cannot save a configuration that Composer has had.
    alone = get_peft_model(load(base), LoraConfig(**settings))
    alone.load_state_dict(adapted.model.state_dict())
    alone.save_pretrained(tmp_path / "adapter")
    tokenizer_of(base).save_pretrained(tmp_path / "adapter")
    for source in (path, tmp_path / "adapter"):
        with open_model(str(source), device="cpu") as opened:
            assert not any("lora" in name for name, _ in opened.model.named_parameters())
            torch.testing.assert_close(logits(opened.model), expected, rtol=1e-4, atol=1e-5)
            again = load(opened.folder).eval()
            assert torch.equal(logits(again), logits(opened.model))
    assert not list(temporary.iterdir())


def test_adapters_of_a_bfloat16_base_are_added_in_the_dtype_that_is_asked_for(
    base, tmp_path, temporary
):
    """Their changes are often smaller than what bfloat16 can add."""
    load(base).bfloat16().save_pretrained(tmp_path / "base")
    tokenizer_of(base).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", torch_dtype=torch.float32)
    settings = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "up_proj"]}
    adapted = get_peft_model(model, LoraConfig(**settings))
    for name, weight in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.01)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer_of(base).save_pretrained(tmp_path / "adapter")
    with open_model(str(tmp_path / "adapter"), device="cpu", dtype="float32") as opened:
        torch.testing.assert_close(
            logits(opened.model), logits(adapted.eval()), rtol=1e-5, atol=1e-7
        )


def test_mpt_of_llm_foundry_needs_no_code_of_its_folder(base, tmp_path):
    model = make_mpt({})
    path = save(wrapped(model, tokenizer_of(base)), tmp_path / "ba1.pt")
    with open_model(str(path), device="cpu") as opened:
        assert type(opened.model).__module__ == "llmfoundry.models.mpt.modeling_mpt"
        assert torch.equal(logits(opened.model), logits(model.eval()))


def test_an_error_leaves_no_conversion_behind(base, tmp_path, temporary):
    path = save(wrapped(load(base)), tmp_path / "ba1.pt")
    with pytest.raises(ValueError, match=r"ba1.pt holds no tokenizer. Convert it by"):
        open_model(str(path), device="cpu")
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("source", "settings", "kind", "message"),
    [
        ("{}/none.pt", {}, FileNotFoundError, "none.pt does not exist. Allowed is a folder"),
        ("ba7.pt", {}, FileNotFoundError, "ba7.pt does not exist. Allowed is a folder"),
        ("{}", {}, ValueError, "is a folder, but of no model. Allowed is a folder"),
        ("org/model-v1.0", {}, ValueError, "org/model-v1.0: its tokenizer cannot be loaded"),
        ("{}", {"dtype": "int8"}, ValueError, "dtype='int8' is none of auto, float64"),
        ("{}", {"device": "abacus"}, ValueError, "device='abacus' is no device of torch"),
    ],
)
def test_errors_name_what_was_given_and_what_is_allowed(tmp_path, source, settings, kind, message):
    with pytest.raises(kind, match=message):
        open_model(source.format(tmp_path), **{"device": "cpu", **settings})
