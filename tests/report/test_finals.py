"""What is compared was evaluated on the same text."""

from dataclasses import replace

from made_runs import APEX, make_run

from apex_composer.report.answers import answer

PLAIN, BETTER = [4.0, 3.0, 2.5], [4.0, 2.6, 2.4]


def test_totals_of_different_text_are_not_compared():
    one = make_run("vanilla", {"a": [2.0], "b": [1.0]}, tokens={"a": 10, "b": 10})
    other = make_run("apex", {"a": [2.0], "b": [1.0]}, tokens={"a": 10, "b": 99}, settings=APEX)
    found = answer([one, other])
    assert found.domains == ("a", "b", "total")
    assert found.finals["apex"]["total"].loss_difference is None
    assert found.finals["apex"]["a"].loss_difference.mean == 0
    assert any("evaluate different text" in line for line in found.cautions)
    unknown = answer([make_run("vanilla", {"a": [2.0], "b": [1.0]})])
    assert unknown.domains == ("a", "b") and "There is no total" in " ".join(unknown.cautions)


def test_tokens_to_reach_are_not_those_of_totals_of_different_text():
    """Equal curves in every domain, of which one has more weight in the second run's total."""
    curves = {"a": [4.0, 3.0, 2.5], "b": [2.0, 1.5, 1.2]}
    one = make_run("vanilla", curves, tokens={"a": 10, "b": 10})
    other = make_run("apex", curves, tokens={"a": 10, "b": 90}, settings=APEX)
    found = answer([one, other])
    assert [reach.domain for reach in found.reaches] == ["a"]
    assert [reach.domain for reach in answer([one, replace(other, validation_tokens={"a": 10,
        "b": 10})]).reaches] == ["total"]  # fmt: skip
    more = make_run("apex", {**curves, "c": [1.0, 0.5, 0.1]}, tokens={"a": 10, "b": 10, "c": 10},
                    settings=APEX)  # fmt: skip
    assert [reach.domain for reach in answer([one, more]).reaches] == ["a", "b"]


def test_one_domain_of_different_text_is_not_compared():
    one = make_run("vanilla", {"eval": PLAIN}, tokens={"eval": 1000})
    other = make_run("apex", {"eval": BETTER}, tokens={"eval": 2500}, settings=APEX)
    found = answer([one, other])
    assert found.finals["apex"]["eval"].loss_difference is None and not found.reaches
    assert "cannot be compared" in found.sentence
    told = "apex and vanilla evaluate different text: eval has 1,000 and 2,500 predicted tokens."
    assert told in found.cautions
    # Of runs that have not kept the numbers nothing is known against it.
    assert answer([one, replace(other, validation_tokens={})]).reaches


def test_every_seed_must_have_evaluated_the_same_text():
    def runs(name, losses, tokens, **options):
        return [
            make_run(
                name, {"a": losses, "b": losses}, seed=seed, tokens={"a": 10, "b": own}, **options
            )
            for seed, own in enumerate(tokens)
        ]

    same = answer(
        [*runs("vanilla", PLAIN, [10, 10]), *runs("apex", BETTER, [10, 10], settings=APEX)]
    )
    assert same.finals["apex"]["total"].loss_difference is not None
    other = answer(
        [*runs("vanilla", PLAIN, [10, 10]), *runs("apex", BETTER, [10, 90], settings=APEX)]
    )
    assert other.finals["apex"]["total"].loss_difference is None
    assert any("evaluate different text: b has 10 and 90" in line for line in other.cautions)
    alone = answer(runs("vanilla", PLAIN, [10, 90]))
    assert "runs of vanilla evaluate different text: b has 10 and 90 pr" in " ".join(alone.cautions)
