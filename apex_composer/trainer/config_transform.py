"""Every way of writing `algorithms` in a YAML, for llm-foundry, which takes one.

The transform runs in every llm-foundry training of an environment that has this package installed,
also in those without APEX: it imports nothing but Python's own, and leaves alone what it does not
know.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

Settings = dict[str, Any]


def normalise_algorithms(config: Settings) -> Settings:
    """Turn every form of a training configuration's `algorithms` into the one llm-foundry accepts.

    `[apex]`, `[apex, {gradient_clipping: {...}}]`, `{apex: null}` and `{apex: {...}}` all become a
    mapping from name to settings, in the order given. llm-foundry itself takes a mapping only.

    Args:
        config: The configuration, resolved, before llm-foundry checks it. Not modified.

    Returns:
        A shallow copy with `algorithms` as a mapping, or `config` itself where there are none or
        where they have a form not known here, which llm-foundry then reports in its own words.

    Raises:
        ValueError: A list names an algorithm twice, or has settings beside the name of an
            algorithm instead of below it; or there are `defaults`, which nobody has merged.
    """
    if isinstance(config, Mapping) and "defaults" in config:
        raise ValueError(
            f"defaults: got {config['defaults']}, which llm-foundry's own train.py does not merge. "
            "Start with apex-composer's train.py, or train on what `apex-composer show` prints"
        )
    algorithms = config.get("algorithms") if isinstance(config, Mapping) else None
    if isinstance(algorithms, Sequence) and not isinstance(algorithms, str):
        algorithms = _from_list(algorithms)
    if not isinstance(algorithms, Mapping):
        return config
    normalised = copy(config)
    normalised["algorithms"] = {
        name: {} if settings is None else settings for name, settings in algorithms.items()
    }
    return normalised


def _from_list(entries: Sequence[Any]) -> Settings | None:
    """Merge a list of names and one-algorithm mappings; None if an entry is neither."""
    merged: Settings = {}
    for entry in entries:
        named = {entry: None} if isinstance(entry, str) else entry
        if not isinstance(named, Mapping):
            return None
        _refuse_settings_beside_the_name(named)
        for name, settings in named.items():
            if name in merged:
                raise ValueError(
                    f"algorithms: {name!r} is listed twice. List every algorithm once, with all "
                    f"its settings below its name: `- {name}: {{...}}`."
                )
            merged[name] = settings
    return merged


def _refuse_settings_beside_the_name(entry: Mapping[str, Any]) -> None:
    """Recognise `- apex:` followed by settings that are not indented below it."""
    loose = [key for key, value in entry.items() if not isinstance(value, Mapping | None)]
    if loose:
        first = next(iter(entry))
        raise ValueError(
            f"algorithms: the list entry {dict(entry)!r} gives {loose} a plain value, but the "
            f"value of an algorithm's name is a mapping of its settings or nothing. Indent the "
            f"settings below the name: `- {first}: {{{loose[0]}: {entry[loose[0]]!r}}}`."
        )
