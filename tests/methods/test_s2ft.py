"""S2FT: what moves, what stays, and that a run is one of APEX without operators."""

import pytest
import torch
from composer.models import HuggingFaceModel
from composer_run import assert_same_weights, make_trainer, run
from helpers import tiny_llama
from llmfoundry.utils.builders import build_algorithm

from apex_composer import APEX, find_sites
from apex_composer.methods.s2ft import S2FT

SHARE = {"all": 0.35, "output": 0.125}


def s2ft(projections: str = "all", **settings) -> S2FT:
    return S2FT(trainable_share=SHARE[projections], projections=projections, **settings)


def moved(algorithm: S2FT, **options) -> tuple[dict, dict]:
    """Which entries a run has moved, by the weight's name, and the rows' indices by the site's."""
    model = tiny_llama()
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = make_trainer(algorithm, model=model, **options)
    trainer.fit()
    sites = {site.name.removeprefix("model."): site for site in algorithm._expander.training.sites}
    rows = {
        name: (site.axis, site.indices(algorithm._expander.training.rows[site.name].units))
        for name, site in sites.items()
    }
    trainer.close()
    return {name: weight != start[name] for name, weight in model.state_dict().items()}, rows


@pytest.mark.parametrize("projections", SHARE)
def test_rows_of_random_units_are_trained_and_nothing_else_moves_by_a_bit(projections):
    algorithm = s2ft(projections, seed=3)
    changed, rows = moved(algorithm)
    output = {name for name in changed if name.endswith(("o_proj.weight", "down_proj.weight"))}
    every = {site.name for site in find_sites(tiny_llama())}
    assert set(rows) == (output if projections == "output" else every)
    for name, entries in changed.items():
        expected = torch.zeros_like(entries)
        if name in rows:
            axis, indices = rows[name]
            expected.index_fill_(axis, indices, True)
        assert torch.equal(entries, expected), name
    share = sum(int(entries.sum()) for entries in changed.values())
    share /= sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert 0.9 * SHARE[projections] <= share <= SHARE[projections]


def test_units_are_drawn_once_by_the_seed_alone():
    drawn = [
        {name: own.tolist() for name, (_, own) in moved(s2ft(seed=seed), **options)[1].items()}
        for seed, options in ((3, {}), (3, {"seed": 5, "max_duration": "2ba"}), (4, {}))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_it_is_apex_at_random_without_operators():
    """Bit for bit; it says so in checkpoints by a name of its own."""
    settings = {"assessment": {"method": "random"}, "expansion": False, "stages": 1}
    reference = APEX(trainable="selected", trainable_share=SHARE["all"], **settings)
    assert_same_weights(run(s2ft())[1], run(reference)[1])


def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path):
    """And its checkpoint is an ordinary one."""
    dtype, saved = torch.bfloat16, {"save_folder": str(tmp_path), "save_interval": "1ba"}
    _, weights, _ = run(s2ft(), model=tiny_llama(dtype=dtype), **saved)
    path = tmp_path / "ep0-ba3-rank0.pt"
    resumed = run(s2ft(), model=tiny_llama(seed=1, dtype=dtype), load_path=str(path))[1]
    assert_same_weights(resumed, weights)
    content = torch.load(path, weights_only=False)["state"]
    assert [name for name, _ in content["algorithms"]] == ["S2FT"]
    HuggingFaceModel(tiny_llama(seed=1), tokenizer=None).load_state_dict(content["model"])
    trainer = make_trainer(s2ft("output"), load_path=str(path))
    with pytest.raises(ValueError, match="^trainable_share: the checkpoint was trained with 0.35"):
        trainer.fit()
    trainer.close()


def test_a_longer_run_goes_on_with_its_rows_and_so_does_a_shorter_one(tmp_path):
    """In the middle and at the end: a cool-down ends where it wants."""
    saved = {"save_folder": str(tmp_path), "save_interval": "1ba"}
    run(s2ft(), max_duration="4ba", **saved)
    for batch, end in ((2, "6ba"), (4, "6ba"), (2, "3ba")):
        path = str(tmp_path / f"ep0-ba{batch}-rank0.pt")
        weights = run(s2ft(), max_duration=end, load_path=path)[1]
        assert_same_weights(weights, run(s2ft(), max_duration=end)[1])


def test_nothing_is_assessed():
    algorithm = s2ft()
    trainer = make_trainer(algorithm)
    trainer.fit()
    assert algorithm._expander.state_dict()["scores"] == {}
    assert [record["samples"] for record in algorithm.history] == [0]
    trainer.close()


def test_llm_foundry_knows_it_by_name():
    assert isinstance(build_algorithm("s2ft", {"projections": "output"}), S2FT)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="^projections: got 'down', allowed: all, output"):
        S2FT(projections="down")
    with pytest.raises(TypeError, match="^s2ft: unknown key 'threshold'"):
        S2FT(threshold=0.1)
    with pytest.raises(ValueError, match="trainable_share: got None"):
        S2FT(trainable_share=None)
    with pytest.raises(ValueError, match="got 0.024, which cannot be met within 10 % from below"):
        make_trainer(S2FT())
    with pytest.raises(ValueError, match="got apex 2 times, allowed: once .s2ft counts"):
        make_trainer(s2ft(), APEX())
