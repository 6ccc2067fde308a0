import math

import pytest
from reproduce.tables import show, show_loss, show_percent

from apex_composer.report.estimates import estimate


@pytest.mark.parametrize(
    ("values", "as_difference", "as_loss"),
    [
        ([0.001, 0.003], "+0.00200 ± 0.01271", "0.0020 ± 0.0127"),
        ([-1.5, -1.5], "−1.50000 ± 0.00000", "−1.5000 ± 0.0000"),
        ([2.0], "+2.00000", "2.0000"),  # a difference has its sign however large it is
        ([0.0, 0.0], "0", "0.0000 ± 0.0000"),
        ([0.0, math.nan], "diverged", "diverged"),
        ([math.inf], "diverged", "diverged"),
    ],
)
def test_differences_have_their_sign_and_losses_none(values, as_difference, as_loss):
    assert (show(estimate(values)), show_loss(estimate(values))) == (as_difference, as_loss)


def test_ratios_of_perplexities():
    assert show_percent(estimate([math.log(1.1)])) == "+10.00 %"
    assert show_percent(estimate([0.0, 0.0])) == "0"
    assert show_percent(estimate([math.nan, 0.1])) == "diverged"
    # The exponential of a wide interval is no number that a page could show.
    assert show_percent(estimate([1.0, 200.0])) == "+4.4e+45 % (−100.00 to beyond all numbers)"
    assert show_percent(estimate([800.0])) == "beyond all numbers"
