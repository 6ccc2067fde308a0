"""One finished preparation that several tests look at and none changes."""

import pytest
from corpus import sentences, write_corpus, write_jsonl
from prepared import run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The folder of corpus and `out`, and the manifest."""
    folder = tmp_path_factory.mktemp("prepared")
    corpus = write_corpus(folder / "corpus", documents=80)
    # Copies, within a domain and across, of which some fall into validation.
    copies = [sentences(seed) for seed in range(240)]
    write_jsonl(corpus / "copies" / "x.jsonl", copies + copies[:100])
    return folder, run(corpus, folder / "out")
