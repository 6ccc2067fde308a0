"""What of an Expander a checkpoint holds: tensors on the CPU, numbers, strings, lists and dicts."""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from apex_composer.operators.optimizer import to_cpu
from apex_composer.settings import check_same, check_same_members

if TYPE_CHECKING:
    from apex_composer.expander import Expander

STATE_VERSION = 1


def pack_state(expander: "Expander", moments: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The state of an expander (collective: scores are summed over the ranks).

    Args:
        expander: folded.
        moments: of its operators' optimizer.
    """
    return {
        "version": STATE_VERSION,
        "settings": expander.settings(),
        "sites": [site.name for site in expander.sites],
        "stage": expander.stage,
        "selections": {name: to_cpu(sets) for name, sets in expander.selections.items()},
        "factors": {o.site.name: to_cpu(o.factors) for o in expander.operators},
        "moments": moments,
        "scores": {
            name: [*to_cpu([t.scores, t.norm_sums]), t.samples]
            for name, t in expander.assessment.totals().items()
        },
        "history": deepcopy(expander.history),
    }


def check_state(expander: "Expander", state: dict[str, Any]) -> None:
    """Raise ValueError where a saved state does not fit, naming what differs."""
    check_same("apex state version", state["version"], STATE_VERSION)
    for setting, now in expander.settings().items():
        check_same(setting, state["settings"].get(setting), now)
    check_same_members("sites", state["sites"], [site.name for site in expander.sites])
