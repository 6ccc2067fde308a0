"""What makes a model another one than that of an earlier result."""

import pytest

from apex_composer.evaluate.identity import describe_model


@pytest.mark.parametrize("where", ["config", "generation_config"])
def test_the_same_weights_with_other_settings_are_another_model(model_folder, open_model, where):
    with open_model(model_folder) as opened:
        before = describe_model(opened.model, opened.tokenizer)
        opened.model.config._name_or_path = "elsewhere"
        assert describe_model(opened.model, opened.tokenizer) == before
        name = {"config": "rope_theta", "generation_config": "repetition_penalty"}[where]
        setattr(getattr(opened.model, where), name, 1.5)
        assert describe_model(opened.model, opened.tokenizer) != before
