"""The harness's view of a model: its length, its precision, and how programs are drawn."""

import pytest
import torch
from test_mpt import make_mpt
from transformers.generation.utils import GenerationMixin

from apex_composer.evaluate.evaluation import Evaluation, Settings
from apex_composer.evaluate.preset import read_preset
from apex_composer.evaluate.run_task import wrap_model


def test_probabilities_of_a_bfloat16_model_are_summed_in_float32(model_folder, open_model):
    """In bfloat16 the sums of two answers would often be equal, and the first one right."""
    with open_model(model_folder) as opened:
        model = opened.model.bfloat16()
        wrapped = wrap_model(model, opened.tokenizer, 2, None)
        ids = opened.tokenizer("w1 " + "w7 w300 " * 20, return_tensors="pt").input_ids[0].tolist()
        ((found, _),) = wrapped._loglikelihood_tokens([(("", ""), ids[:1], ids[1:])])
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    expected = logs.gather(1, torch.tensor(ids)[1:, None]).sum().item()
    assert found == pytest.approx(expected, rel=1e-6)
    assert torch.tensor(found).bfloat16().item() != pytest.approx(found, rel=1e-6)
    assert wrap_model(model.double(), opened.tokenizer, 2, None).softmax_dtype == torch.float64


def test_prompts_are_as_long_as_the_models_positions(model_folder, open_model):
    """Those of llm-foundry's MPT too, whose name the harness does not know."""
    with open_model(model_folder) as opened:
        assert wrap_model(opened.model, opened.tokenizer, 2, None).max_length == 512
        mpt = make_mpt({})
        assert wrap_model(mpt, opened.tokenizer, 2, None).max_length == mpt.config.max_seq_len
        assert wrap_model(mpt, opened.tokenizer, 2, 20).max_length == 20


def test_programs_are_drawn_as_the_page_says(
    preset, data_dir, model_folder, open_model, tmp_path, monkeypatch
):
    """At temperature 0.8 and top-p 0.95 out of all tokens, not of the 50 likeliest; 20 of them."""
    drawn, tasks = [], read_preset(str(preset)).tasks
    settings = Settings(data_dir=data_dir, max_length=1100, run_code=True)

    def keep(self, input_ids, logits_processor, **_):
        drawn.append((len(input_ids), {type(one).__name__: vars(one) for one in logits_processor}))
        return torch.cat([input_ids, torch.full((len(input_ids), 1), 3)], 1)

    monkeypatch.setattr(GenerationMixin, "_sample", keep)
    failed = Evaluation(tasks[3:], settings, tmp_path / "eval.json", str).evaluate(
        str(model_folder), open_model
    )
    assert failed == []
    assert sum(count for count, _ in drawn) == 20
    for _, warpers in drawn:
        assert {*warpers} == {"TemperatureLogitsWarper", "TopPLogitsWarper"}
        assert warpers["TemperatureLogitsWarper"]["temperature"] == 0.8
        assert warpers["TopPLogitsWarper"]["top_p"] == 0.95
