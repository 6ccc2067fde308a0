"""Each domain's share of the samples."""

from hypothesis import given
from hypothesis import strategies as st

from apex_composer.evaluate.samples import share_out


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 1000))
def test_shares_add_up_and_nobody_is_left_out(counts, more):
    given = {str(number): count for number, count in enumerate(counts)}
    samples = len(counts) + more
    shares = share_out(given, samples)
    assert sum(shares.values()) == min(samples, sum(counts))
    for name, count in given.items():
        assert 1 <= shares[name] <= count
