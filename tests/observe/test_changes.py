"""What training changed, against changes that were made by hand."""

import pytest
import torch
from helpers import selection
from saved_runs import load, noisy, save, save_sharded, wrapped
from tiny_models import CONFIGURATIONS, tiny_model

from apex_composer.model.find_sites import find_sites
from apex_composer.observe.changes import match_names, measure_changes, open_weights

UP = "model.layers.1.mlp.up_proj.weight"


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return open_weights(folder)


def test_a_change_of_known_rank_in_known_rows(tmp_path):
    model = tiny_model("llama", torch.float64)
    base = saved(model, tmp_path)
    before = dict(model.named_parameters())[UP].detach().clone()
    change = torch.zeros_like(before)
    change[2], change[5] = 3 * torch.eye(32)[0], 4 * torch.eye(32)[1]
    with torch.no_grad():
        dict(model.named_parameters())[UP] += change
    units = {"model.layers.1.mlp.channels": selection([2, 3], [5, 6])}
    found = dict(measure_changes(model, find_sites(model), base, units, device="cpu"))
    entry = found.pop(UP)
    assert entry["shape"] == [24, 32] and entry["dtypes"] == ["float64", "float64"]
    assert entry["change"] == pytest.approx(5)
    assert entry["relative_change"] == pytest.approx(5 / float(before.norm()))
    assert entry["advantageous_change"] == pytest.approx(3 / float(before[[2, 3]].norm()))
    assert entry["disadvantageous_change"] == pytest.approx(4 / float(before[[5, 6]].norm()))
    assert entry["unselected_change"] == 0
    assert entry["singular_values"][:2] == pytest.approx([4, 3])
    assert len(entry["singular_values"]) == 24
    assert entry["energy"] == pytest.approx({"1": 16 / 25, "4": 1, "16": 1, "64": 1})
    # Adding and taking away rounds each number: what is below the tolerance counts as nothing.
    assert entry["numerical_rank"] == 2
    shares = torch.tensor([4 / 7, 3 / 7])
    assert entry["entropy_rank"] == pytest.approx(float((-shares * shares.log()).sum().exp()))
    assert found["model.embed_tokens.weight"]["projection"] == "embed_tokens"
    assert {one["relative_change"] for one in found.values()} == {0}
    same = found["model.layers.0.mlp.up_proj.weight"]
    assert (same["energy"], same["numerical_rank"], same["entropy_rank"]) == (None, 0, 0)


@pytest.mark.parametrize("model_type", sorted(CONFIGURATIONS))
def test_every_parameter_of_every_architecture_is_compared_once(model_type, tmp_path):
    model = tiny_model(model_type)
    base = saved(model, tmp_path)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    noisy(model, 1)
    found = dict(measure_changes(model, find_sites(model), base, device="cpu"))
    parts = {site.name.partition("[")[0] for site in find_sites(model)}
    expanded = {name.partition("[")[0] for name, one in found.items() if "energy" in one}
    assert expanded == parts
    assert {name.partition("[")[0] for name in found} == before.keys()
    for name, old in before.items():
        parts = [one for key, one in found.items() if key.partition("[")[0] == name]
        expected = float((dict(model.named_parameters())[name].detach() - old).norm())
        assert sum(one["change"] ** 2 for one in parts) ** 0.5 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["shards of safetensors", "checkpoint", "sharded checkpoint"])
def test_a_base_may_lie_in_any_form(kind, tmp_path):
    model = tiny_model("llama")
    if kind == "shards of safetensors":
        base = saved(model, tmp_path, max_shard_size="10KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    else:
        file = save(wrapped(model), tmp_path / "ba0.pt")
        base = open_weights(
            save_sharded(file, tmp_path / "shards") if kind == "sharded checkpoint" else file
        )
    with torch.no_grad():
        model.lm_head.weight += 1
    found = dict(measure_changes(model, find_sites(model), base, device="cpu"))
    assert {name for name, one in found.items() if one["change"]} == {"lm_head.weight"}
    assert found["lm_head.weight"]["change"] == pytest.approx((64 * 32) ** 0.5)


def test_names_without_prefix_and_of_tied_weights_are_found(tmp_path):
    model = tiny_model("gpt2")  # its head is its embedding
    model.transformer.save_pretrained(tmp_path)
    stored = match_names(model, open_weights(tmp_path))
    assert stored["transformer.wte.weight"] == "wte.weight" and "lm_head.weight" not in stored


def test_rounding_to_bfloat16_is_told_by_the_dtypes(tmp_path):
    model = tiny_model("llama")
    base = saved(model, tmp_path)
    entry = dict(measure_changes(model.bfloat16(), find_sites(model), base, device="cpu"))[
        "lm_head.weight"
    ]
    assert entry["dtypes"] == ["bfloat16", "float32"]
    assert entry["relative_change"] == pytest.approx(0.0017, rel=0.1)


def test_an_interrupted_run_goes_on_with_what_is_missing(tmp_path):
    model = tiny_model("llama")
    base = saved(model, tmp_path)
    whole = measure_changes(noisy(model, 1), find_sites(model), base, device="cpu")
    first = dict([next(whole)])
    rest = dict(measure_changes(model, find_sites(model), base, device="cpu", done=first))
    assert rest == dict(whole) and not first.keys() & rest.keys()


def test_other_models_are_refused_by_the_names_that_differ(tmp_path):
    base = saved(tiny_model("llama"), tmp_path / "llama")
    with pytest.raises(ValueError, match=r"is not the base of this model: transformer.*nothing"):
        other = tiny_model("gpt2")
        next(measure_changes(other, find_sites(other), base))
    deeper = load(tmp_path / "llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.\S+ is in the base only"):
        next(measure_changes(deeper, find_sites(deeper), base))
    wider = load(tmp_path / "llama")
    wider.resize_token_embeddings(65)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[65, 32\], in the base \[64, "):
        next(measure_changes(wider, find_sites(wider), base))


def test_folders_without_safetensors_are_told_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors.*save_pretrained"):
        open_weights(tmp_path)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model = tiny_model("llama")
    base = saved(model, tmp_path)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"q_proj\.weight has 1 numbers that are not finite"):
        dict(measure_changes(model, find_sites(model), base))
