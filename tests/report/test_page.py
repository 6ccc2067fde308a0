"""The structure of the file; `make test-report` looks at it in a browser."""

import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from example_report import estimate, example_answer, example_run, largest, two_runs

from apex_composer.report.page import make_page, make_title, show_interval, show_number, show_value

VOID = {"meta", "link", "br", "image", "path", "use", "rect", "img"}


class Page(HTMLParser):
    """Tags with their attributes, sections, and the text of table rows."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.rows = [], [], {}
        self.section = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("th", "td"):
            self.rows[self.section][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if {"th", "td"} & {*self.open} and self.rows.get(self.section):
            self.rows[self.section][-1][-1] += f" {data.strip()}"

    def row(self, section: str, number: int) -> list[str]:
        return [" ".join(cell.split()) for cell in self.rows[section][number]]


@pytest.fixture(scope="module")
def text():
    return make_page(example_answer(two_runs()), "apex against vanilla")


def test_sections_and_tables(text):
    page = Page(text)
    assert page.open == []
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == [
        *("perplexity", "curves", "reach", "stages", "ranks", "speed"),
        *("settings", "origin", "missing"),
    ]
    assert page.row("perplexity", 0) == ["run", "total", "arxiv", "github"]
    assert page.row("perplexity", 1)[0] == "vanilla"
    name, total, *_ = page.row("perplexity", 2)
    answer = example_answer(two_runs()).finals["apex"]["total"]
    assert name == "apex"
    shown = f"{answer.perplexity.mean:.3f} {answer.perplexity_difference.mean:+.3f}"
    assert total == shown.replace("-", "−")
    assert page.row("reach", 1)[:5] == ["apex", "vanilla", "total", "280 k", "68.4 %"]
    assert page.row("speed", 2)[:6] == [
        "apex",
        "0.3020 s",
        "0.2990 to 0.3100 s",
        "6,781",
        "–",
        "1.5 %",
    ]
    assert page.row("settings", 1) == ["algorithms.apex.threshold", "none", "0.125"]


def test_nothing_comes_from_outside_and_everything_has_a_name(text):
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag != "script"
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (tag, attributes)
        if tag == "svg":
            assert "aria-label" in attributes or attributes.get("aria-hidden") == "true"
    assert "http" not in text.replace("http-equiv", "") and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert sum(tag == "figure" for tag, _ in page.tags) > 20


def test_what_users_wrote_is_text():
    name = '<script>alert("x")</script>'
    groups = {name: [replace(example_run("one"), name=name, data={"<b>": "<i>"})]}
    text = make_page(example_answer(groups), f"{name} & more")
    assert "<script" not in text and "<b>&" not in text and "&lt;script&gt;" in text
    assert "&lt;i&gt;" in text and "&lt;b&gt;" in text


def test_a_run_that_kept_nothing_gives_a_page_that_says_so():
    bare = replace(
        example_run("bare"),
        loss=replace(example_run("bare").loss, batches=[], tokens=[], values=[]),
        validation={},
        metrics={},
        step_seconds=[],
        data={},
    )
    compared = replace(
        example_answer({"bare": [example_run("bare")]}),
        domains=(),
        finals={},
        missing={"bare": ("loss: no local_metrics",)},
    )
    (group,) = compared.groups
    compared = replace(compared, groups=(replace(group, runs=(bare,)),))
    text = make_page(compared, "bare")
    assert "No run has kept an evaluation" in text and "loss: no local_metrics" in text
    assert "No run has kept its training loss" in text and 'class="legend"' not in text
    assert "Dotted vertical lines" not in text and "callback <code>speed_monitor" in text
    assert "Nothing is known of it." in text and "Nothing to compare" in text


def test_the_largest_case_is_below_two_megabytes():
    assert len(make_page(example_answer(largest()), "ten").encode()) < 2_000_000


def test_titles():
    assert make_title(example_answer(two_runs())) == "apex against vanilla"
    assert make_title(example_answer({"one": [example_run("one")]})) == "one"
    many = {str(n): [example_run(str(n), batches=20)] for n in range(7)}
    assert make_title(example_answer(many)) == "6 runs against 0"
    answer = example_answer(many)
    groups = tuple(replace(group, baseline=int(group.name) < 3) for group in answer.groups)
    several = replace(answer, groups=groups, baselines=("1", "0", "2"))
    assert make_title(several) == "4 runs against 1, 2 more"


def test_numbers_for_people():
    assert [show_number(n) for n in (0.30212, 1234.5, None, 0.0)] == [
        "0.3021",
        "1,234",
        "–",
        "0",
    ]
    assert show_interval(estimate(-0.5)) == "−0.500"
    assert show_interval(estimate(math.nan)) == "no number"
    assert show_interval(estimate(1e300)) == "1e+300"
    assert show_interval(estimate(0.5, 0.5), signed=True) == "+0.500 (+0.490 to +0.510)"
    assert show_value({"tokens": 12345, "done": True}) == "tokens: 12,345, done: True"
