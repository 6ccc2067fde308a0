import json

import pytest

from apex_composer.data_prep.read.domains import (
    DOMAIN_PATTERN,
    infer_domain,
    normalise_domain,
    source_domain,
)

# The records of the releases, shortened; the sample's mirror keeps `meta` as a string.
METAS = {
    "cc": {"pred_label": "__label__wiki", "pred_label_prob": 0.8, "source": "cc/2019-30/x"},
    "c4": {"timestamp": "2019-04-24", "source": "c4", "language": "en", "url": "http://a"},
    "github": {"content_hash": "a", "timestamp": "", "source": "github", "license": "mit"},
    "book": {"short_book_title": "Title", "publication_date": 1850, "url": "http://a"},
    "arxiv": {"timestamp": "x", "yymm": "2301", "arxiv_id": "1", "language": "en", "url": "u"},
    "wikipedia": {"timestamp": "20230320", "title": "T", "language": "en", "url": "u"},
    "stackexchange": {"timestamp": "x", "source": "stackexchange", "question_score": "3"},
}


@pytest.mark.parametrize("domain", METAS)
@pytest.mark.parametrize("form", [dict, json.dumps, repr])
def test_every_domain_is_inferred_from_its_keys(domain, form):
    assert infer_domain({"text": "a", "meta": form(METAS[domain])}) == domain


@pytest.mark.parametrize("domain", METAS)
def test_a_schema_with_all_keys_and_nulls_misleads_nobody(domain):
    everything = {key: None for meta in METAS.values() for key in meta}
    assert infer_domain({"text": "a", "meta": {**everything, **METAS[domain]}}) == domain


def test_records_that_show_no_domain():
    for meta in (None, "", "words", "{'a': ", "[1]", {}, {"title": None}, 3, "(" * 9999, "{[]: 1}"):
        assert infer_domain({"text": "a", "meta": meta}) is None


def test_what_a_record_says_goes_before_what_its_keys_suggest():
    record = {"red_pajama_subset": "common_crawl", "meta": METAS["c4"]}
    assert infer_domain(record) == "cc"
    assert infer_domain({"text": "a", "wiki_prob": 0.3}) == "cc"  # without meta, as in the 1T


def test_names_are_normalised_and_other_names_are_kept():
    given = ["common_crawl", "RedPajamaC4", "RedPajamaArXiv", "wiki", "Books", "StackExchange"]
    expected = ["cc", "c4", "arxiv", "wikipedia", "book", "stackexchange"]
    assert [normalise_domain(name) for name in given] == expected
    assert normalise_domain("My-Poems") == "My-Poems"


def test_sources_of_dolma_become_usable_names_that_never_fall_together():
    plain = ["cc_en_head", "wiki", "wikipedia", "pes2o", "stack-dedup", "C4", "x" * 64]
    assert [source_domain(source) for source in plain] == plain
    odd = ["web/en", "web en", "web.en", "/web/en", "../..", "ä", "\ud800", "x" * 65, "x" * 66]
    names = [source_domain(source) for source in odd]
    assert len(set(names)) == len(odd)
    assert all(DOMAIN_PATTERN.fullmatch(name) and len(name) < 80 for name in names)
    assert names[0] == "web_en-31a32248"
    assert {source_domain(source) for source in (None, "", " ", 3, ["wiki"])} == {None}
