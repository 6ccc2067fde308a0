import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_composer.data_prep.choose.proportions import (
    LLAMA1,
    read_proportions,
    share_out,
    streams_block,
)
from apex_composer.data_prep.errors import SettingsError


@given(st.sets(st.sampled_from(sorted(LLAMA1)), min_size=1))
def test_absent_domains_give_their_share_to_the_others(domains):
    shares, absent = share_out(LLAMA1, sorted(domains))
    assert sum(shares.values()) == pytest.approx(1)
    assert set(absent) | domains == set(LLAMA1) and not set(absent) & domains


def test_a_domain_without_a_proportion_is_refused():
    with pytest.raises(SettingsError, match="no entry for poems"):
        share_out(LLAMA1, ["poems"])
    with pytest.raises(SettingsError, match="no entry for 0, 1, .*, 19, 9980 more; they name cc,"):
        share_out(LLAMA1, map(str, range(10_000)))
    assert share_out(None, ["poems", "prose"])[0] == {"poems": 0.5, "prose": 0.5}


def test_proportions_come_from_a_file(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"common_crawl": 3, "poems": 1}))
    assert share_out(read_proportions(str(path)), ["cc", "poems"])[0] == {"cc": 0.75, "poems": 0.25}
    path.write_text(json.dumps({"cc": 0}))
    with pytest.raises(SettingsError, match="cc=0 must be above 0"):
        read_proportions(str(path))
    with pytest.raises(SettingsError, match="neither 'llama1' nor a file"):
        read_proportions("llama2")


def test_domains_are_named_in_a_file_as_they_are_written(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("no: 67\n2013_20: 15.5\nCC-MAIN-2013-20: 1e1\n10BT: 2\n")
    given = {"no": 67.0, "2013_20": 15.5, "CC-MAIN-2013-20": 10.0, "10BT": 2.0}
    assert read_proportions(str(path)) == given
    for value in ("true", "many", "[1]", "-1", ".nan", "nan", "inf", ""):
        path.write_text(f"no: {value}\n")
        with pytest.raises(SettingsError, match="no=.* must be above 0"):
            read_proportions(str(path))


def test_another_name_counts_only_where_no_domain_has_it_itself():
    assert share_out({"wiki": 3, "c4": 1}, ["wikipedia", "c4"])[0] == {
        "wikipedia": 0.75,
        "c4": 0.25,
    }
    with pytest.raises(SettingsError, match="no entry for wikipedia"):
        share_out({"wiki": 1}, ["wiki", "wikipedia"])
    both = share_out({"wiki": 1, "wikipedia": 3}, ["wiki", "wikipedia"])
    assert both == ({"wiki": 0.25, "wikipedia": 0.75}, [])


def test_the_streams_block_is_yaml_of_llm_foundry():
    import yaml

    streams = yaml.safe_load(streams_block("/a b/train", {"cc": 0.67, "c4": 0.33}))["streams"]
    assert streams["cc"] == {"local": "/a b/train/cc", "remote": None, "proportion": 67.0}
