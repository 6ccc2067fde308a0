"""The YAML of the comparison: methods differ in what they vary and in names, in nothing else."""

import pytest
from omegaconf import OmegaConf

from apex_composer.compare.configuration import (
    DEFAULT_YAML,
    best_of,
    blocks,
    build_runs,
    choose_methods,
)
from apex_composer.demo.configuration import load_template
from apex_composer.settings import SIDES

OUT = "runs/x"
NAMES = {"run_name"}
SAVING = ("folder", "interval", "num_checkpoints_to_keep", "weights_only", "overwrite")
AVERAGED = {"variables.average_checkpoints", *(f"save_{key}" for key in SAVING)}
# What a method may change; all that is not here: its own algorithm.
VARIED = {
    "base": {"max_duration", "optimizer.lr"},
    "full": set(),
    "full_half_rate": {"optimizer.lr"},
    "full_double_rate": {"optimizer.lr"},
    "full_wsd": {"scheduler"},
    "full_averaged": AVERAGED,
    "full_ema": {"algorithms.ema"},
    **dict.fromkeys(("lora", "dora", "rslora", "pissa"), {"model.peft_config", "optimizer.lr"}),
    "relora": {
        *("model.peft_config", "model.should_save_peft_only"),
        *("optimizer.lr", "algorithms.relora"),
    },
    **dict.fromkeys(("apex_selected", "apex_disadvantageous"), {"algorithms.apex", "optimizer.lr"}),
    "s2ft": {"algorithms.s2ft", "optimizer.lr"},
    "act_regu_s2ft": {"algorithms.act_regu", "algorithms.s2ft", "optimizer.lr"},
    **dict.fromkeys(("galore", "apollo", "muon"), {"optimizer"}),
}
# Those that are like another one.
ONE_KEY = {
    "apex_half_no_expansion": ("apex_half", "algorithms.apex.expansion"),
    "apex_half_random": ("apex_half", "algorithms.apex.assessment.method"),
    "apex_half_average": ("apex_half", "algorithms.apex.assessment.method"),
    "apex_disadvantageous": ("apex_selected", "algorithms.apex.trainable"),
    "dora": ("lora", "model.peft_config.use_dora"),
    "rslora": ("lora", "model.peft_config.use_rslora"),
    "pissa": ("lora", "model.peft_config.init_lora_weights"),
}


def template(*overrides):
    return load_template(DEFAULT_YAML, OUT, overrides)


def runs(*overrides, methods=None, seeds=1, inputs=None):
    given = template(*overrides)
    return build_runs(given, methods or choose_methods(given), seeds, "fp32", inputs)


def differing(first, second, prefix=""):
    """The shallowest keys by which two configurations differ."""
    found = set()
    for key in first.keys() | second.keys():
        one, other = first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= differing(one, other, f"{prefix}{key}.")
        elif one != other:
            found.add(prefix + key)
    return found - NAMES


def test_methods_differ_in_what_they_vary_and_in_names_only():
    settings = {run.method: run.settings for run in runs()}
    assert set(VARIED) <= set(settings)
    for method, own in settings.items():
        kind = "apex" if method.startswith("apex") else method
        allowed = VARIED.get(method, {f"algorithms.{kind}"})
        found = differing(settings["full"], own)
        others = {k for k in found if not any(f"{k}.".startswith(f"{a}.") for a in allowed)}
        assert not others, method
        assert len(found) >= len(allowed), method


@pytest.mark.parametrize("method", ONE_KEY)
def test_a_variant_differs_from_its_like_in_one_key(method):
    like, key = ONE_KEY[method]
    first, second = (run.settings for run in runs(methods=[like, method]))
    assert differing(first, second) == {key}


SMALL_SHARE = (
    *("lora", "dora", "rslora", "pissa", "relora"),
    *("apex_selected", "apex_disadvantageous", "s2ft", "act_regu_s2ft"),
)


def test_a_small_share_has_five_times_the_rate_and_rows_are_of_one_share():
    settings = {run.method: run.settings for run in runs()}
    rates = {settings[method]["optimizer"]["lr"] for method in SMALL_SHARE}
    assert rates == {5 * settings["full"]["optimizer"]["lr"]}
    algorithms = {method: own["algorithms"] for method, own in settings.items()}
    apex = [algorithms[m]["apex"] for m in ("apex_selected", "apex_disadvantageous")]
    shares = {own["trainable_share"] for own in (*apex, algorithms["s2ft"]["s2ft"])}
    assert len(shares) == 1 and {own["trainable"] for own in apex} < set(SIDES)


def test_a_seed_changes_the_data_order_and_nothing_else():
    first, second = (run.settings for run in runs(methods=["full"], seeds=2))
    loaders = {"train_loader.dataset.shuffle_seed", "seed", "eval_loader"}
    assert differing(first, second) == {*loaders, "loggers.local_metrics.folder"}
    assert (first["seed"], second["seed"]) == (17, 18)


def test_a_run_is_known_by_its_settings_and_by_what_it_reads():
    before = {run.method: run.identity for run in runs(inputs={"base": "a"})}
    assert len(set(before.values())) == len(before)
    assert {run.method: run.identity for run in runs(inputs={"base": "a"})} == before
    assert {run.identity for run in runs(inputs={"base": "b"})}.isdisjoint(before.values())
    changed = runs("variables.lora.r=4", inputs={"base": "a"})
    other = {run.method for run in changed if run.identity != before[run.method]}
    assert other == {"lora", "dora", "rslora", "pissa", "relora"}


def test_null_leaves_a_setting_of_the_optimizer_out():
    given = template()
    given.methods.full = {"optimizer": {"betas": None}}
    [run] = build_runs(given, ["full"], 1, "fp32", None)
    assert sorted(run.settings["optimizer"]) == ["eps", "lr", "name", "weight_decay"]


def test_the_best_of_others_has_no_run_and_brings_theirs():
    given = template()
    rates = ["full", "full_half_rate", "full_double_rate"]
    assert sorted(best_of(given, "full_tuned")) == sorted(rates)
    assert choose_methods(given, ["lora", "full_tuned"]) == [*rates, "lora"]
    assert "full_tuned" not in choose_methods(given)


def test_methods_that_the_yaml_lacks_are_refused():
    with pytest.raises(ValueError, match="--only.*'ful'.*Did you mean 'full'"):
        choose_methods(template(), ["ful"])
    circle = {"a": {"like": "b"}, "b": {"like": "a"}, "c": {"like": "d"}}
    for method in ("a", "c"):
        with pytest.raises(ValueError, match=rf"methods\.{method}\.like"):
            blocks(OmegaConf.create({"methods": circle}), method)
