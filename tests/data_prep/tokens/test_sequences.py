import pytest

from apex_composer.data_prep.tokens.sequences import token_type


@pytest.mark.parametrize(
    ("size", "name"), [(32_000, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_the_smallest_type_is_taken(size, name):
    assert token_type(size) == name
