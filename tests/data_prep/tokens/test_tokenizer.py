import json
import shutil

import pytest
from prepared import tokenizer_folder

from apex_composer.data_prep.tokens.tokenizer import load_tokenizer, token_type


def test_a_vocabulary_with_gaps_reaches_to_its_last_id(tmp_path):
    folder = shutil.copytree(tokenizer_folder(), tmp_path / "gaps")
    parts = json.loads((folder / "tokenizer.json").read_text())
    last = max(parts["model"]["vocab"], key=parts["model"]["vocab"].get)
    parts["model"]["vocab"][last] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    assert load_tokenizer(str(folder), tmp_path / "saved").vocabulary_size == 70_001


@pytest.mark.parametrize(
    ("size", "name"), [(32_000, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_the_smallest_type_is_taken(size, name):
    assert token_type(size) == name
