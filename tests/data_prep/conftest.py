"""One finished preparation that several tests look at and none changes."""

import pytest
from corpus import sentences, write_corpus, write_jsonl
from hypothesis import settings
from prepared import run

# On a busy machine any example may take longer than hypothesis' 200 ms.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The folder of corpus and `out`, and the manifest."""
    folder = tmp_path_factory.mktemp("prepared")
    corpus = write_corpus(folder / "corpus", documents=80)
    # Copies, within a domain and across, of which some fall into validation.
    copies = [sentences(seed) for seed in range(240)]
    write_jsonl(corpus / "copies" / "x.jsonl", copies + copies[:100])
    return folder, run(corpus, folder / "out")
