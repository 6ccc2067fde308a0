import numpy as np
import pytest
from apex_composer.data_prep.sequences import cut, token_type, wrap_document
from hypothesis import given
from hypothesis import strategies as st

token_lists = st.lists(st.integers(0, 65_535), max_size=40)


@given(st.lists(st.lists(token_lists, max_size=5), max_size=6), st.integers(1, 16))
def test_every_token_is_accounted_for_in_order(batches, sequence_length):
    remainder, written = np.empty(0, dtype="uint16"), []
    for batch in batches:
        documents = [np.array(tokens, dtype="uint16") for tokens in batch]
        sequences, remainder = cut(remainder, documents, sequence_length)
        assert sequences.shape[1] == sequence_length and sequences.dtype == "uint16"
        assert len(remainder) < sequence_length
        written += sequences.flatten().tolist()
    expected = [token for batch in batches for tokens in batch for token in tokens]
    assert written + remainder.tolist() == expected


@given(token_lists)
def test_documents_stand_between_bos_and_eos(tokens):
    assert wrap_document(tokens, 1, 2, "uint16").tolist() == [1, *tokens, 2]


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_type_holds_the_largest_token(size, dtype):
    assert token_type(size) == dtype
    assert wrap_document([], 0, size - 1, dtype).tolist() == [0, size - 1]
