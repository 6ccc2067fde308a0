"""What ends a job on a Ray cluster, or must not, and what is told of it."""

import cluster_tasks
import pytest
from corpus import write_corpus
from prepared import small_options
from ray_clusters import add_node, prepare_on_ray, wait_for

from apex_composer.data_prep.engines import ray_cluster
from apex_composer.data_prep.engines.engine import Engine
from apex_composer.data_prep.errors import SettingsError, SourceError, WorkerDiedError

pytestmark = pytest.mark.ray
BLIND = """
import builtins, io, os

def blind(function):
    def see(path, *arguments, **names):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith({hidden!r}):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return function(path, *arguments, **names)
    return see

for module, name in ((builtins, "open"), (io, "open"), (os, "stat"), (os, "scandir")):
    setattr(module, name, blind(getattr(module, name)))
"""


def test_a_task_that_kills_every_worker_is_named(on_ray, tmp_path):
    told = r"5 workers of the Ray cluster died at some/file(.|\n)*Give the same command again"
    with pytest.raises(WorkerDiedError, match=told):
        on_ray(cluster_tasks.die, [{"name": "some/file"}])
    assert list((tmp_path / ".work").iterdir()) == []


def test_tasks_are_drawn_as_cores_get_free(on_ray):
    drawn, most = [], []

    def tasks():
        for number in range(30):
            drawn.append(number)
            yield {"name": str(number), "number": number, "seconds": 0.02}

    with pytest.MonkeyPatch.context() as patch:
        receive = ray_cluster._receive
        results = []

        def counted(*arguments):
            most.append(len(drawn) - len(results))
            results.append(receive(*arguments))
            return results[-1]

        patch.setattr(ray_cluster, "_receive", counted)
        found, documents = on_ray(cluster_tasks.double, tasks())
    assert found == {str(number): 2 * number for number in range(30)}
    assert sum(documents) == sum(found.values()) and max(most) <= 2 + ray_cluster.WAITING


def test_a_cluster_without_room_is_waited_for_and_told(on_ray, cluster, monkeypatch):
    told = []

    def warn(text, stacklevel):
        if not told:
            for _ in range(2):
                add_node(cluster)
        told.append(text)

    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)
    wait_for(lambda: sum(node["Alive"] for node in ray_nodes()) == 1)
    monkeypatch.setattr(ray_cluster.warnings, "warn", warn)
    assert on_ray(cluster_tasks.double, [{"name": "a", "number": 3}])[0] == {"a": 6}
    assert told[0].startswith("No node of the Ray cluster has a core and 1 GiB of memory")


def ray_nodes():
    import ray

    return ray.nodes()


def test_a_machine_without_room_is_an_error(cluster, monkeypatch):
    monkeypatch.setattr(ray_cluster, "TASK_MEMORY", 1 << 60)
    with pytest.raises(SettingsError, match="engine='ray': this machine has not a core and"):
        ray_cluster._count_slots(is_local=True)


def test_a_client_without_a_token_is_told(tmp_path, monkeypatch):
    import ray

    def refuse(**settings):
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    told = (
        r"address='ray://head:10001': no Ray .* connection timeout(.|\n)*RAY_AUTH_MODE=token here"
    )
    with (
        pytest.raises(SettingsError, match=told),
        Engine("ray", "ray://head:10001").opened(tmp_path),
    ):
        pass


def test_an_address_of_another_cluster_than_the_connected_one_is_refused(job, cluster, tmp_path):
    told = "address='auto': this process is connected to a Ray cluster already"
    with pytest.raises(SettingsError, match=told):
        prepare_on_ray(job, tmp_path / "out", address="auto")


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        ("SourceError", ("a.gz:3: cut short",)),
        ("DiskFullError", (28, "the disk is full")),
        ("ShortfallError", ("too little", ["book"])),
        ("Rejected", ("blank text", "book")),
    ],
)
def test_an_error_is_that_of_the_local_engine(on_ray, error, arguments):
    task = {"name": "a", "error": error, "arguments": arguments}
    with pytest.raises((OSError, ValueError)) as local:
        cluster_tasks.fail(task, None)
    with pytest.raises(local.type) as caught:
        on_ray(cluster_tasks.fail, [task])
    assert type(caught.value) is local.type and str(caught.value) == str(local.value)
    assert vars(caught.value) == vars(local.value) and caught.value.args == local.value.args


def test_a_damaged_archive_is_an_error_that_names_the_line(cluster, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    archive = corpus / "github" / "b.jsonl.gz"
    archive.write_bytes(archive.read_bytes()[:-20])
    # Without budgets nothing is sampled, so that a worker finds it.
    options = small_options(train_tokens=None, cpt_tokens=None)
    with pytest.raises(SourceError, match=r"b\.jsonl\.gz"):
        prepare_on_ray((corpus, None), tmp_path / "out", options=options)


def test_a_node_that_does_not_see_a_folder_is_named(job, cluster, tmp_path):
    hidden = tmp_path / "hidden"
    (tmp_path / "sitecustomize.py").write_text(BLIND.format(hidden=str(hidden)))
    corpus = write_corpus(hidden / "corpus")
    for node in list(cluster.worker_nodes):  # another one could do all tasks before this one starts
        cluster.remove_node(node)
    blind = add_node(cluster, path=tmp_path)
    with pytest.raises(SettingsError, match=r"The Ray node .* does not see the output folder"):
        prepare_on_ray(job, hidden / "out")
    told = r"The Ray node .* does not see .*hidden/corpus.* of the input"
    with pytest.raises(SettingsError, match=told):
        prepare_on_ray((corpus, None), tmp_path / "out")
    cluster.remove_node(blind, allow_graceful=False)
    for _ in range(2):
        add_node(cluster)


def test_a_node_with_other_versions_is_refused(job, cluster, tmp_path, monkeypatch):
    other = (("tokenizers", "0.0.1"),)
    monkeypatch.setattr(ray_cluster, "own_versions", lambda: other)
    told = r"The Ray node .* has tokenizers .* gives the tasks has 0\.0\.1"
    with pytest.raises(SettingsError, match=told):
        prepare_on_ray(job, tmp_path / "out")


def test_reports_of_an_attempt_that_died_are_not_counted(on_ray, tmp_path):
    task = {"name": "a", "number": 3, "marker": str(tmp_path / "marker")}
    results, documents = on_ray(cluster_tasks.die_at_first, [task])
    assert results == {"a": 6} and sum(documents) == 6
    assert documents[:2] == [1, -1]  # told while it was at work, and taken back
