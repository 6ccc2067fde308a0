import pickle

import cluster_tasks
import pytest

from apex_composer import extras
from apex_composer.data_prep import errors
from apex_composer.data_prep.engines.engine import Engine
from apex_composer.data_prep.errors import SettingsError
from apex_composer.extras import MissingExtraError


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "dask"}, "engine='dask' must be one of local, ray"),
        ({"address": "auto"}, "address='auto' is that of a Ray cluster: give --engine ray"),
        ({"workers": 0}, "workers=0 must be at least 1"),
    ],
)
def test_a_wrong_setting_is_named(settings, told):
    with pytest.raises(SettingsError, match=told):
        Engine(**settings)


def test_a_missing_ray_is_told_before_anything_begins(monkeypatch):
    monkeypatch.setattr(extras, "_is_installed", lambda name: name != "ray")
    with pytest.raises(MissingExtraError, match=r"pip install 'apex-composer\[ray\]'"):
        Engine("ray")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_with_their_tasks_and_reports(tmp_path, workers):
    tasks = ({"name": str(number), "number": number} for number in range(6))
    news = []
    with Engine(workers=workers).opened(tmp_path) as map_tasks:
        found = {t["name"]: r for t, r in map_tasks(cluster_tasks.double, tasks, news.append, 6)}
    assert found == {str(number): 2 * number for number in range(6)}
    assert sum(one["documents"] for one in news) == sum(found.values())


def test_errors_come_through_pickle_with_what_they_hold():
    for error in (
        errors.SourceError("a.gz:3: cut short"),
        errors.DiskFullError(28, "the disk is full"),
        errors.ShortfallError("too little", ["book"]),
        errors.Rejected("blank text", "book"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)
