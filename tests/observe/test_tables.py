"""What stands in the printed tables."""

from rich.console import Console

from apex_composer.observe.tables import make_tables


def shown(found) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(*make_tables(found))
    return capture.get()


def ranks(*values: float) -> dict:
    weights = {
        f"layers.{layer}.Wqkv.weight[keys]": {
            "layer": layer,
            "projection": "Wqkv[keys]",
            "entropy_rank": value,
            "numerical_rank": 8,
        }
        for layer, value in enumerate(values)
    }
    return {"ranks": {"weights": weights}}


def test_ranks_are_means_of_layers_with_the_growth_since_the_first_model():
    text = shown({"base": ranks(2.0, 4.0), "[run] 2": ranks(3.0, 4.5)})
    assert "Wqkv[keys]" in text and "[run] 2" in text  # brackets are no markup
    assert "3.00" in text and "3.75 (+0.75)" in text
    assert "rank" in shown({"base": ranks(2.0)})


def delta(selected: dict, **changes) -> dict:
    entry = {"projection": "Wqkv[keys]", "energy": None, **changes}
    head = {"projection": "lm_head", "relative_change": 0.9}
    return {"delta": {"base": "b", "selected": selected, "weights": {"w": entry, "h": head}}}


def test_changes_are_those_of_expanded_weights_and_of_selected_rows_where_there_are_any():
    sides = {"advantageous_change": 0.02, "disadvantageous_change": 0.03}
    text = shown(
        {"run": delta({"by": "scores"}, relative_change=0.01, unselected_change=None, **sides)}
    )
    row = next(line for line in text.splitlines() if "Wqkv[keys]" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["1", "2", "3", ""]
    assert "lm_head" not in text and "run against b" in text
    assert "unselected" not in shown({"run": delta({}, relative_change=0.01)})
