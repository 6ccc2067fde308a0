"""Training YAMLs that share their common parts by `defaults: [file, ...]`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> Any:
    """Read a YAML with the files that its `defaults` names, and change the keys given.

    Later files win: the defaults in their order, each with defaults of its own below it, then the
    file itself, then `overrides`. Mappings are merged, all else is replaced; null is a value, too,
    with which an algorithm has its default settings, and is not removed. References `${...}` stay
    as they are, so that they lead to what is merged last.

    Args:
        path: file to read; what its `defaults` names is relative to it.
        overrides: `key=value` entries as on llm-foundry's command line. Default: none.

    Returns:
        The omegaconf.DictConfig without the key `defaults`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is no YAML of settings, the defaults lead back to a file, or a list
            stands in one where another has a mapping.
    """
    from omegaconf import OmegaConf

    OmegaConf.clear_resolver("oc.env")  # as llm-foundry does: the environment changes no setting
    merged = OmegaConf.create()
    given = OmegaConf.from_dotlist(list(overrides))
    for source, layer in [*_layers(path, ()), ("command line", given)]:
        for key in _clashes(merged, layer):
            raise ValueError(
                f"{source}: {key}: a list and a mapping cannot be merged, and one of them stands "
                "here, the other in what this changes. Needed: two mappings, such as "
                "`algorithms: {apex: null}` for `algorithms: [apex]`"
            )
        merged = OmegaConf.merge(merged, layer)
    return merged


def _clashes(below: Any, above: Any) -> Iterator[str]:
    """Dotted keys that are a list in one configuration and a mapping in the other."""
    from omegaconf import OmegaConf

    for key in above:
        if key not in below or any(OmegaConf.is_interpolation(one, key) for one in (below, above)):
            continue
        own = below[key], above[key]
        if all(OmegaConf.is_dict(one) for one in own):
            yield from (f"{key}.{inner}" for inner in _clashes(*own))
        elif all(OmegaConf.is_config(one) for one in own) and type(own[0]) is not type(own[1]):
            yield str(key)


def _layers(path: Path, readers: tuple[Path, ...]) -> list[tuple[Path, Any]]:
    """A file's defaults and the file, the lowest first; `readers` led to it by their defaults."""
    chain = " -> ".join(map(str, (*readers, path)))
    if path.resolve() in [reader.resolve() for reader in readers]:
        raise ValueError(f"defaults: {chain} leads back to itself")
    if not path.is_file():
        told = f" (defaults: {chain})" if readers else ""
        raise FileNotFoundError(f"{path} does not exist{told}. Needed: a training YAML")
    names, own = _read(path)
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{path}: defaults: got {names!r}, needed: a list of YAML files, relative to this one"
        )
    below = [_layers(path.parent / name, (*readers, path)) for name in names]
    return [*(layer for layers in below for layer in layers), (path, own)]


def _read(path: Path) -> tuple[Any, Any]:
    """What a file has below `defaults`, and all else that it has."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.load(path)
        names = config.pop("defaults", []) if isinstance(config, DictConfig) else None
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} holds {type(config).__name__}, needed: a mapping of settings")
    return names, config
