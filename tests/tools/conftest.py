"""What the tests of `apex-composer plan` share."""

import json

import pytest
from tinyllama import TINYLLAMA

from apex_composer.callbacks import start_checks


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The override that gives TinyLLaMA's config.json without a hub."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINYLLAMA))
    return f"variables.model={folder}"


@pytest.fixture
def roomy_disk(monkeypatch):
    """A disk with room: a plan names a full one as a problem, whichever machine it is made on."""
    monkeypatch.setattr(start_checks, "free_bytes", lambda folder: 10**12)
