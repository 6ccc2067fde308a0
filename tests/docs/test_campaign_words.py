"""What the sentences on a campaign say is what its numbers say."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
from campaign_records import APEX, CONSTANT, SCALE, make_record, small_campaign, write_records

from apex_composer.report.estimates import Estimate

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
make_results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_results)
campaign_words = sys.modules["campaign_words"]


def gpu_like(constant=False) -> list[dict]:
    """One stage, two pairs, a base that ended at a lower rate and a lower loss."""
    rates = {"base_rate": 1e-3, "base_end": 0.4, "rate": 1e-3, "rates": [1.0]}
    own = {"scale": SCALE | rates, "ends": [100]}
    plain = {"vanilla_stagewise": (3.0, 3.2, 3.1), "apex_rank": (3.1, 3.1)}
    plain |= {"vanilla_constant": (3.1, 3.1)} if constant else {}
    settings = {"apex_rank": APEX, "vanilla_constant": CONSTANT}
    return [
        make_record(arm, seed, [2.5, end], settings=settings.get(arm), **own)
        for arm, losses in plain.items()
        for seed, end in enumerate(losses, 1)
    ]


def test_a_base_that_is_warmed_up_again_is_told(tmp_path):
    write_records(tmp_path / "reproduce-gpu.jsonl", gpu_like())
    page = " ".join(make_results.make_page(tmp_path).split())
    assert "had read 0.5 M tokens; its loss is 2.5000 nats." in page
    assert "had ended at 0.0004; the arms go on at 0.001, which warms it up again." in page
    assert "The loss of 2 of 2 arms ends above the base's: none is better than what it" in page
    assert (
        "is +0.00000 ± 1.27062 nats after its only stage (the interval includes 0 and inc" in page
    )
    assert "with 1 degree of freedom, a difference below 1.27062 nats cannot be told" in page
    better = [one | {"losses": [{"book": 4.0}, one["losses"][1]]} for one in gpu_like()]
    write_records(tmp_path / "reproduce-gpu.jsonl", better)
    assert "The loss of 0 of 2 arms ends above the base's.\n" in make_results.make_page(tmp_path)


def test_a_goal_that_the_base_had_reached_already_takes_no_batches(tmp_path):
    write_records(tmp_path / "reproduce-gpu.jsonl", gpu_like(constant=True))
    page = " ".join(make_results.make_page(tmp_path).split())
    assert "The constant rate ends no better than the base: when others reach its last" in page
    assert "(paper: 33 %)" not in page and "none of" not in page
    low, higher = ({"book": value, "code": value} for value in (2.0, 2.2))
    lost = [
        one | {"losses": [one["losses"][0], higher if one["arm"] == "apex_rank" else low]}
        for one in gpu_like(constant=True)
    ]
    write_records(tmp_path / "reproduce-gpu.jsonl", lost)
    page = " ".join(make_results.make_page(tmp_path).split())
    assert "after 100 % of the batches, by APEX never in 2 of 2 seeds (paper: 33 %)" in page


def test_a_diverged_run_has_no_difference(tmp_path):
    records = gpu_like()
    records[-1]["losses"][1] = {"book": math.nan, "code": 3.0}
    page = make_results.make_page(write_records(tmp_path / "reproduce-gpu.jsonl", records).parent)
    assert (
        "has diverged: no difference." in page
        and "| apex_rank | vanilla_stagewise | 2 | div" in page
    )
    assert "nan" not in page


@pytest.mark.parametrize(("low", "high", "told"), [(-0.3, -0.1, "excludes 0"), (-1, 1, "includes")])
def test_intervals_in_words(low, high, told):
    estimate = Estimate((low + high) / 2, low, high, (low, high))
    assert told in campaign_words.judge(estimate)
    assert "includes the paper's −0.200" in campaign_words.judge(estimate, -0.2)


def test_arms_with_one_seed_are_told_from_chance_by_the_pairs_of_main(tmp_path):
    """t with 2 degrees of freedom, 4.303, times the 0.001 by which three pairs differ."""
    vary = APEX | {"variation": {"x": 1}}
    given = {"study": "operator_rate", "settings": vary}
    records = [*small_campaign(), make_record("vary", 1, [3.5, 3.2, 3.1], **given)]
    write_records(tmp_path / "reproduce-cpu.jsonl", records)
    page = make_results.make_page(tmp_path)
    told = "of APEX in the paper's comparison do (0.00100, 2 degrees of freedom), differences "
    assert page.count("An arm with one seed has no interval") == 1
    assert f"{told}above 0.00430" in page.partition("## One thing at a time")[2]
    assert "Of 1 arms that select units 0 end lower than plain training by more; 1 end hi" in page
    # Of another text there is another base, and no scatter of its own: that of one kind counts.
    other = {"base": "c" * 64, "texts": "u" * 64}
    plain = make_record("vanilla_stagewise", 1, [3.5, 3.2, 3.0], **other)
    vary = make_record("vary", 1, [3.5, 3.2, 2.9], **other, **given)
    write_records(tmp_path / "reproduce-cpu.jsonl", [*small_campaign(), plain, vary])
    page = make_results.make_page(tmp_path).partition("base mixture cccccccc\n")[2]
    assert told in page and "1 end lower than plain training by more: `vary`;" in page
    vary = [make_record("vary", seed, [3.5, 3.2, 3.1], **given) for seed in (1, 2, 3)]
    write_records(tmp_path / "reproduce-cpu.jsonl", [*small_campaign(), *vary])
    assert "no interval" not in make_results.make_page(tmp_path)


def test_the_lowest_arm_is_named_and_the_lowest_that_selects_units(tmp_path):
    arms = {
        "vanilla_stagewise": ([3.5, 3.0], {}), "vanilla_rate_0.1": ([3.5, 2.9], {"rate": 0.1}),
        "apex_rank": ([3.5, 3.01], APEX), "weak": ([3.5, 3.005], {"apex": {"trainable": "w"}}),
    }  # fmt: skip
    made = {
        arm: make_record(arm, 1, losses, ends=[100], settings=own)
        for arm, (losses, own) in arms.items()
    }
    path = write_records(tmp_path / "reproduce-cpu.jsonl", list(made.values()))
    told = "Lowest at the end is `vanilla_rate_0.1`, −0.10000 against `vanilla_stagewise`; of the "
    told += "arms that select units `weak`, +0.00500 against `vanilla_stagewise`.\n"
    assert told in make_results.make_page(path.parent)
    del made["vanilla_rate_0.1"]
    write_records(path, [*made.values(), make_record("vanilla_wsd", 1, [3.5, 3.2], ends=[100],
                                                     settings={"schedule": "wsd"})])  # fmt: skip
    told = "Lowest at the end is `vanilla_stagewise`; of the arms that select units `weak`, +0.005"
    assert told in make_results.make_page(path.parent)


def test_what_splitting_costs_and_whether_copies_part_is_told(tmp_path):
    settings = APEX | {"variation": {"split": True}}
    for seed, after, cosine in ((1, 3.7, 0.9), (2, 3.9, 0.8)):
        facts = [
            {"split_losses": {"before": 3.5, "after": after}, "split_similarity": 0.95},
            {"split_losses": {"before": 3.5, "after": 3.6}, "split_similarity": cosine},
        ]
        given = {"study": "splitting", "settings": settings, "stages": facts}
        write_records(tmp_path / f"{seed}.jsonl", [make_record("split", seed, [3, 3, 3], **given)])
    lines = "".join((tmp_path / f"{seed}.jsonl").read_text() for seed in (1, 2))
    (tmp_path / "reproduce-cpu.jsonl").write_text(lines)
    page = make_results.make_page(tmp_path)
    assert "copies of strong ones at the beginning of each stage, the loss rises by 0.3000" in page
    assert ", 0.1000; at the stages' ends the cosine between the rows of both is 0.95000, " in page
    assert "0.95000, 0.85000 (1: copies still)" in page


def test_the_text_that_both_were_trained_on_is_a_second_measure(tmp_path):
    """Means of every fifth of a stage: APEX is 0.01 * seed above in the first, 0.001 in the other.

    Of one seed 0.1 and 0.2 above: far more than pairs of the main comparison scatter, which is
    0.0001 in the last stage.
    """
    facts = {
        "domains": {
            "book": {"base": 1, "continued": 6000},
            "code": {"base": 1, "continued": 10_000},
        }
    }
    records = []
    for seed in (1, 2, 3):
        plain = [3.0 + seed + 0.01 * fifth for fifth in range(10)]
        gain = [0.01 * seed] * 5 + [0.001 + 0.0001 * (seed - 2)] * 5
        apex = [loss + own for loss, own in zip(plain, gain, strict=True)]
        vary = [loss + own for loss, own in zip(plain, [0.1] * 5 + [0.2] * 5, strict=True)]
        for arm, losses, own in (("vanilla_stagewise", plain, {}), ("apex_rank", apex, APEX)):
            records.append(make_record(arm, seed, [3, 2, 1 + 0.1 * (arm == "apex_rank") * seed],
                settings=own, training_losses=losses, texts_facts=facts))  # fmt: skip
        if seed == 1:
            own = APEX | {"variation": {"x": 1}}
            records.append(make_record("vary", 1, [3, 2, 1], study="rates", settings=own,
                training_losses=vary, texts_facts=facts))  # fmt: skip
    write_records(tmp_path / "reproduce-cpu.jsonl", records)
    page = " ".join(make_results.make_page(tmp_path).split())
    told = (
        "trained on (0.5 times its text), every batch before its step, APEX minus plain training "
    )
    assert (
        f"{told}is +0.02000 ± 0.02484, +0.00100 ± 0.00025 in its stages (the interval exc" in page
    )
    told = "On the training text of the last stage those above 0.00043 are (0.000100, 2 degrees"
    assert f"{told} of freedom). Of 1 arms that select units 0 are lower" in page
    assert "; 1 are higher than plain training by more: `vary`." in page
    records[1]["training_losses"] = records[1]["training_losses"][:-1]
    write_records(tmp_path / "reproduce-cpu.jsonl", records)
    assert "every batch before its step" not in make_results.make_page(tmp_path)


def test_what_a_base_was_not_trained_on_stands_apart_from_what_is_forgotten(tmp_path):
    shift = {"base": "shift"}
    plain = make_record("shift_vanilla_stagewise", 1, [3, 2, 1], study="shift", settings=shift)
    apex = make_record("shift_apex_rank", 1, [3, 2, 1], study="shift", settings=shift | APEX)
    for record, docs, github in ((plain, 1.0, 4.0), (apex, 0.9, 4.5)):
        record["losses"] = [{"documentation": 3.0, "packages": 3.0, "github": 2.0}] * 2
        record["losses"].append({"documentation": docs, "packages": 1.0, "github": github})
        record["texts_facts"] = {"domains": {"github": {"base": 24_000, "continued": 1}}}
    page = make_results.make_page(
        write_records(tmp_path / "reproduce-cpu.jsonl", [plain, apex]).parent
    )
    assert "`shift_vanilla_stagewise` at the end, on what both read: −0.05000; on github" in page
    assert "on github, which they forget (2.000 becomes 4.000): +0.50000 (seeds 1).\n" in page
    assert "The base had read 0.5 M tokens (20 times its text); its loss" in page


def test_fresh_seeds_are_held_against_every_rate_that_was_run_with_them(tmp_path):
    """0.001 lower than plain training at its own rates, 0.0005 higher than at the other rate."""
    shift = {"base": "shift"}
    arms = {
        "shift_vanilla_stagewise": (shift, 0.0), "shift_apex_rank": (shift | APEX, -0.001),
        "shift_vanilla_rate_1.5": (shift | {"rate": 1.5}, -0.0015),
    }  # fmt: skip
    records = [
        make_record(arm, seed, [3, 2, 1 + seed / 100 + gain], study=study, settings=own,
                    training_losses=[3.0] * 5 + [2.0 + gain] * 5)
        for arm, (own, gain) in arms.items()
        for seed, study in ((1, "shift"), (101, "confirm"), (102, "confirm"))
    ]  # fmt: skip
    for record in records:
        record["losses"] = [
            {"documentation": own["book"], "packages": own["code"], "github": own["book"]}
            for own in record["losses"]
        ]
    path = write_records(tmp_path / "reproduce-cpu.jsonl", records)
    page = make_results.make_page(path.parent)
    told = "With 2 fresh seeds `shift_apex_rank` minus `shift_vanilla_"
    assert page.count("With 2 fresh seeds") == 2
    assert (
        f"{told}stagewise` is −0.00100 ± 0.00000 at the end (the interval excludes 0) and "
        "−0.00100 ± 0.00000 on the training text of the last stage (the interval excludes 0).\n"
    ) in page
    assert f"{told}rate_1.5` is +0.00050 ± 0.00000 at the end (the interval excludes 0)" in page
    assert "(seeds 101, 102)." in page and "(seeds 1)." in page
    # The tuned rate ends lower still.
    assert "\nNone ends lower than plain training at every rate by more than chance.\n" in page
    write_records(path, [one for one in records if not one["arm"].endswith("1.5")])
    page = make_results.make_page(path.parent)
    assert "\n`shift_apex_rank` ends lower than plain training at every rate by more th" in page


def test_masking_counts_once_for_a_seed_and_not_for_random_weights(tmp_path):
    masked = {"whole": 3.0, "lowest": 3.01, "random": 3.2, "top": 5.0}
    other = masked | {"lowest": 3.03}
    given = [("a", 1, masked), ("b", 1, masked), ("c", 1, masked), ("a", 2, other)]
    records = [make_record(arm, seed, [3, 2, 1], settings=APEX, stages=[{"masked": facts}, {}])
               for arm, seed, facts in given]  # fmt: skip
    page = make_results.make_page(write_records(tmp_path / "reproduce-cpu.jsonl", records).parent)
    assert "lowest norms, this base's loss is 0.0200 nats higher" in page
    for record in records:
        record["base_batches"] = 0
    page = make_results.make_page(write_records(tmp_path / "reproduce-cpu.jsonl", records).parent)
    assert "lowest norms" not in page and "The base's loss is 3.0000 nats." in page


def test_whether_larger_operators_end_higher_is_a_correlation_of_ranks(tmp_path):
    """Squares of 1 to 8 are in the order of 1 to 8; with the largest one the lowest, d = 7, -1, ...

    1 - 6 * (7**2 + 7 * 1) / (8 * 63) = 1/3 (Spearman).
    """
    records = [make_record("vanilla_stagewise", 1, [3, 2, 1])]
    for place in range(1, 9):
        own = APEX | {"variation": {"x": place}}
        facts = [{"relative_norm": 0.001}, {"relative_norm": 0.01 * place}]
        records.append(make_record(f"arm{place}", 1, [3, 2, 1 + place**2 / 1000], study="rates",
                                   settings=own, stages=facts))  # fmt: skip
    split = APEX | {"variation": {"split": True}}
    facts = [{"relative_norm": 9.0, "split_losses": {"before": 3, "after": 4},
              "split_similarity": 1.0}] * 2  # fmt: skip
    records.append(make_record("split", 1, [3, 2, 0.5], study="s", settings=split, stages=facts))
    path = tmp_path / "reproduce-cpu.jsonl"
    told = "operators' largest share of their rows: +1.00 (8 arms)."
    assert told in make_results.make_page(write_records(path, records).parent)
    records[8]["losses"][-1] = {"book": 0.5, "code": 0.5}
    page = make_results.make_page(write_records(path, records).parent)
    assert told.replace("+1.00", "+0.33") in page
    page = make_results.make_page(write_records(path, records[:8]).parent)
    assert "Rank correlation" not in page
