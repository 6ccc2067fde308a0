"""One corpus and one cluster for all tests of the Ray engine."""

import os

import pytest
from corpus import write_corpus
from prepared import file_hashes, run
from ray_clusters import add_node

from apex_composer.data_prep.engines import ray_cluster
from apex_composer.data_prep.engines.engine import Engine


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """A corpus, and what the local engine writes of it."""
    folder = tmp_path_factory.mktemp("job")
    corpus = write_corpus(folder / "corpus", documents=900)
    run(corpus, folder / "local", workers=2)
    return corpus, file_hashes(folder / "local")


@pytest.fixture(scope="session")
def cluster():
    """A head without cores, to which this process is connected, and two nodes of one core each."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.update(ray_cluster.QUIET)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        add_node(cluster)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def on_ray(cluster, tmp_path):
    """Run tasks; their results by name, and the sum of documents reported."""

    def call(work, tasks):
        news = []
        (tmp_path / ".work").mkdir(exist_ok=True)
        with Engine("ray").opened(tmp_path) as map_tasks:
            results = {t["name"]: r for t, r in map_tasks(work, tasks, news.append, 99)}
        return results, [one["documents"] for one in news]

    return call
