"""Selections by scores and recorded ones against those that training has used."""

import pytest
import torch
from helpers import tiny_llama, tokens
from saved_runs import save, save_sharded, wrapped
from tiny_models import tiny_model

from apex_composer.expander import Expander
from apex_composer.model.find_sites import find_sites
from apex_composer.observe.selections import (
    find_selections,
    recorded_selections,
    select_by_scores,
)


def lists(selections) -> dict:
    return {name: [side.tolist() for side in sides] for name, sides in selections.items()}


@pytest.fixture
def stages(tmp_path):
    """Selections of two stages, and a function that saves a checkpoint at a batch."""
    model = tiny_llama()
    expander = Expander(find_sites(wrapped(model)), threshold=0.25)
    found, scores = [], []
    for seed, batch in ((0, 0), (1, 3)):
        with torch.no_grad(), expander.assessing():
            model(tokens(4, seed=seed))
        totals = expander.assessment.totals()
        scores.append({name: t.scores.tolist() for name, t in totals.items()})
        expander.begin_stage(batch=batch)
        found.append(expander.selections)

    def save_at(batch: int, name: str = "some.pt"):
        clock = {"epoch": 0, "batch": batch, "batch_in_epoch": batch, "sample": 6, "token": 9}
        algorithms = [("APEX", {"apex": expander.state_dict()})]
        state = {"algorithms": algorithms, "timestamp": {"Timestamp": clock}}
        torch.save({"state": state}, tmp_path / name)
        return tmp_path / name

    return expander, found, scores, save_at


def test_selections_by_scores_are_those_of_training(stages):
    expander, found, scores, _ = stages
    for selections, own in zip(found, scores, strict=True):
        assert lists(select_by_scores(expander.sites, own, threshold=0.25)) == lists(selections)


@pytest.mark.parametrize(("batch", "stage"), [(2, 0), (3, 0), (4, 1)])
def test_recorded_ones_are_those_of_the_last_stage_that_trained(stages, batch, stage, tmp_path):
    """At batch 3 the second stage has begun, and trained nothing yet."""
    _, found, _, save_at = stages
    sites = find_sites(tiny_llama())  # its groups are named without Composer's prefix
    file = save_at(batch)
    for path in (file, save_sharded(file, tmp_path / "shards")):
        selected = recorded_selections(path, sites)
        assert selected.told == {"by": "checkpoint", "stage": stage}
        expected = {name.removeprefix("model."): own for name, own in lists(found[stage]).items()}
        assert lists(selected.units) == expected


def test_a_record_goes_before_scores_and_scores_before_nothing(stages, tmp_path):
    _, _, scores, save_at = stages
    sites = find_sites(tiny_llama())
    groups = {name.removeprefix("model."): {"score": own} for name, own in scores[0].items()}
    activations = {"groups": groups}
    found = find_selections(str(save_at(2)), sites, activations, 0.25)
    assert found.told["by"] == "checkpoint"
    for source in (save_at(0), save(wrapped(tiny_llama()), tmp_path / "plain.pt"), tmp_path):
        assert find_selections(str(source), sites, activations, 0.25).told == {"by": "scores"}
        assert find_selections(str(source), sites, None, 0.25) == (None, {})


def test_a_record_of_another_model_is_refused(stages):
    _, _, _, save_at = stages
    with pytest.raises(ValueError, match="groups of its stage 0 .* are none of this model"):
        recorded_selections(save_at(2), find_sites(tiny_model("gpt2")))
