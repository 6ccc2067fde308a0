import pytest

from apex_composer.demo.split import make_shares


def test_the_last_split_takes_what_is_left():
    shares = make_shares(0.05, 0.65)
    assert list(shares) == ["validation", "pretrain", "train"]
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("validation", "pretrain", "message"),
    [(0, 0.5, "validation_share=0"), (0.1, 1.0, "pretrain_share=1.0"), (0.4, 0.6, "leave no")],
)
def test_impossible_shares_are_refused(validation, pretrain, message):
    with pytest.raises(ValueError, match=message):
        make_shares(validation, pretrain)
