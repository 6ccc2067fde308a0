"""What makes a model another one than that of an earlier result."""

from types import SimpleNamespace

import pytest

from apex_composer.evaluate.identity import check_positions, describe_model


@pytest.mark.parametrize("where", ["config", "generation_config"])
def test_the_same_weights_with_other_settings_are_another_model(model_folder, open_model, where):
    with open_model(model_folder) as opened:
        before = describe_model(opened.model, opened.tokenizer)
        opened.model.config._name_or_path = "elsewhere"
        assert describe_model(opened.model, opened.tokenizer) == before
        name = {"config": "rope_theta", "generation_config": "repetition_penalty"}[where]
        setattr(getattr(opened.model, where), name, 1.5)
        assert describe_model(opened.model, opened.tokenizer) != before


def test_the_positions_of_a_model_with_images_are_its_language_models():
    config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=64))
    check_positions(config, 64)
    with pytest.raises(ValueError, match="--sequence-length 65 is more than the 64 positions"):
        check_positions(config, 65)
    check_positions(SimpleNamespace(), 10**6)  # nothing says how many there are
