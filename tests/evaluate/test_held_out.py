"""Perplexity in the result file: the losses of `mean_loss`, measured once."""

import json
from dataclasses import asdict, replace

from apex_composer.evaluate import held_out
from apex_composer.evaluate.evaluation import Evaluation, Settings
from apex_composer.evaluate.perplexity import mean_loss
from apex_composer.evaluate.texts import read_texts


def test_perplexity_stands_beside_the_tasks_and_is_measured_once(
    model_folder, open_model, tmp_path, monkeypatch
):
    for domain, text in (("book", "w1 w2 w3"), ("wiki", "w4 w5")):
        (tmp_path / "texts" / domain).mkdir(parents=True)
        lines = (json.dumps({"text": text}) + "\n") * 30
        (tmp_path / "texts" / domain / "a.jsonl").write_text(lines)
    path = tmp_path / "eval.json"

    def record_of(path, model_folder):
        return json.loads(path.read_text())["models"][str(model_folder)]

    with_texts = Settings(texts=tmp_path / "texts", sequence_length=16)
    assert Evaluation([], with_texts, path, str).evaluate(str(model_folder), open_model) == []
    measured = record_of(path, model_folder)["perplexity"]
    with open_model(model_folder) as opened:
        texts = read_texts(tmp_path / "texts", opened.tokenizer, sequence_length=16)
        losses = mean_loss(opened.model, texts)
    assert measured["total"] == asdict(losses.total)
    assert measured["domains"] == {name: asdict(loss) for name, loss in losses.domains.items()}
    assert measured["identity"]["texts_sha256"] == texts.sha256

    with monkeypatch.context() as patch:
        patch.setattr(held_out, "mean_loss", None)
        Evaluation([], with_texts, path, str).evaluate(str(model_folder), open_model)
        assert record_of(path, model_folder)["perplexity"] == measured
        other = replace(with_texts, sequence_length=8)
        failed = Evaluation([], other, path, str).evaluate(str(model_folder), open_model)
    assert len(failed) == 1 and f"{model_folder}, perplexity: TypeError" in failed[0]
    assert "perplexity" not in record_of(path, model_folder)
    longer = replace(with_texts, sequence_length=513)
    (failed,) = Evaluation([], longer, path, str).evaluate(str(model_folder), open_model)
    assert "--sequence-length 513 is more than the 512 positions" in failed
