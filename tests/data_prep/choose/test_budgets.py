from hypothesis import given
from hypothesis import strategies as st

from apex_composer.data_prep.choose.budgets import divide_sequences


@given(st.integers(0, 10**7), st.lists(st.floats(0.01, 1), min_size=1, max_size=9))
def test_divided_sequences_add_up(total, weights):
    shares = {str(number): weight / sum(weights) for number, weight in enumerate(weights)}
    counts = divide_sequences(total, shares)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - total * shares[name]) <= 1 + 1e-6 * total for name in shares)
