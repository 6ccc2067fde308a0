"""Where runs were evaluated last is told, and whether that is their end."""

from dataclasses import replace

from made_runs import APEX, make_run

from apex_composer.report.answers import answer

PLAIN, BETTER = [4.0, 3.0, 2.5], [4.0, 2.6, 2.4]


def test_runs_that_were_evaluated_last_elsewhere_are_told():
    late = make_run("vanilla", {"cc": [4.0, 3.0, 2.5, 2.4]})
    early = make_run("apex", {"cc": BETTER}, settings=APEX)
    assert any("last at 20 k tokens, vanilla at 30 k" in c for c in answer([late, early]).cautions)
    uncounted = [
        replace(run, validation={"cc": replace(own, tokens=[0] * len(own.tokens))})
        for run in (late, early)
        for own in [run.validation["cc"]]
    ]
    assert any("last at 20 batches, vanilla at 30" in c for c in answer(uncounted).cautions)
    dead = [
        make_run("apex", {"cc": own}, seed=len(own), settings=APEX) for own in (PLAIN, PLAIN[:2])
    ]
    found = answer([*dead, late]).cautions
    assert "apex was evaluated last at 10 k to 20 k tokens, vanilla at 30 k tokens." in found


def test_runs_that_have_not_come_to_their_end_do_not_end():
    """Both stand at batch 20 and 20 k tokens."""

    def found(duration, **options):
        own = {"max_duration": duration}
        runs = [make_run("vanilla", {"cc": PLAIN}, settings=own, seed=1)]
        runs += [make_run("apex", {"cc": BETTER}, settings={**APEX, **own}, seed=k) for k in (1, 2)]
        return answer(runs, **options)

    for duration, of in (("30000ba", "20 of 30,000 batches"), ("30_000tok", "20 k of 30 k tokens")):
        early = found(duration)
        assert f"apex is not at its end: evaluated last at {of} in 2 of 2 runs." in early.cautions
        assert f"vanilla is not at its end: evaluated last at {of}." in early.cautions
        assert "apex stands, before its end, at a validation perplexity" in early.sentence
    for duration in ("20ba", "20000tok", "19ba", "1ep"):
        ended = found(duration)
        assert ended.sentence.startswith("apex ends at") and "its end" not in str(ended.cautions)
    alone = answer([make_run("vanilla", {"cc": PLAIN}, settings={"max_duration": "21ba"})])
    assert alone.sentence.startswith("Validation perplexity, before the end, is for vanilla at")
    assert "vanilla is not at its end: evaluated last at 20 of 21 batches." in alone.cautions


def test_without_a_baseline_what_happened_to_the_seeds_is_told_too():
    losses = ([4.0, 3.0, 2.5], [4.0, 3.0, 2.52], [4.0, 3.0])
    group = [make_run("a", {"cc": own}, seed=seed) for seed, own in enumerate(losses)]
    found = answer(group)
    assert "a was evaluated last at 10 k to 20 k tokens." in found.cautions
    assert "there is one run" not in found.sentence and "3 seeds of one run" in found.sentence
    final = found.finals["a"]["cc"].perplexity
    assert (
        f"a at {final.mean:.3f} (95 % interval {final.low:.3f} to {final.high:.3f})"
        in found.sentence
    )
    variants = [make_run(n, {"cc": own}, settings={**APEX, "x": n})
                for n, own in (("a", PLAIN), ("b", PLAIN[:2]))]  # fmt: skip
    assert "b was evaluated last at 10 k tokens, a at 20 k tokens." in answer(variants).cautions
