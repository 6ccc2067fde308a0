"""Which questions a campaign asks, and the arms that answer each."""

from collections.abc import Callable

from reproduce.arms import Arm, main_arms

_STUDIES: dict[str, Callable[[], list[Arm]]] = {
    "main": lambda: [arm for arm in main_arms() if arm.study == "main"],
    "scratch": lambda: [arm for arm in main_arms() if arm.study == "scratch"],
}


def studies() -> list[str]:
    """Their names."""
    return list(_STUDIES)


def arms_of(study: str) -> list[Arm]:
    """The arms of a question, its baseline among them."""
    return _STUDIES[study]()
