import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from apex_composer.demo.model import write_model_folder
from apex_composer.demo.tokenizer import save_tokenizer, train_tokenizer

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(train_tokenizer(["some text for a tokenizer"], 262), tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_the_folder_is_a_model_name_without_a_hub(tmp_path, tokenizer):
    for _ in range(2):  # the second time over the first
        write_model_folder(tmp_path / "model", tokenizer, SIZES, 64)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert config.vocab_size == len(tokens) == 262
    assert (config.bos_token_id, config.eos_token_id) == (tokens.bos_token_id, tokens.eos_token_id)
    assert config.max_position_embeddings == 64
    assert AutoModelForCausalLM.from_config(config).config.hidden_size == 16


def test_a_misspelt_size_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="hidden_sizes"):
        write_model_folder(tmp_path / "model", tokenizer, {"hidden_sizes": 16}, 64)
