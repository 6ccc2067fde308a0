"""Shares of the domains, and the `streams:` block of a training YAML that uses them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apex_composer.data_prep.errors import SettingsError
from apex_composer.data_prep.read.domains import ALIASES, LLAMA1
from apex_composer.extras import needing

SHOWN = 20  # names in a message


def read_proportions(name: str) -> dict[str, float] | None:
    """Read proportions by their name or from a JSON or YAML file.

    Args:
        name: `llama1`, `equal` (None), or the path of a file that maps domains to positive numbers.

    Raises:
        SettingsError: there is no such file, or it holds something else.
    """
    if name == "llama1":
        return dict(LLAMA1)
    if name == "equal":
        return None
    path = Path(name)
    if not path.is_file():
        raise SettingsError(
            f"proportions={name!r} is neither 'llama1' nor a file. Give the path of a JSON or "
            "YAML file such as {cc: 67, c4: 15}."
        )
    content = _parse(path)
    if not isinstance(content, dict) or not content:
        raise SettingsError(
            f"proportions={name!r} must map domains to numbers: {{cc: 67, c4: 15}}."
        )
    return {domain: _positive(name, domain, value) for domain, value in content.items()}


def _positive(name: str, domain: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else 0.0
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise SettingsError(f"proportions={name!r}: {domain}={value!r} must be above 0.")
    return number


def _parse(path: Path) -> Any:
    with needing(f"proportions={str(path)!r}"):
        import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        # As written: to YAML the domains no and 2013_20 would be False and 201320.
        return yaml.load(text, yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"proportions={str(path)!r} cannot be read: {error}") from error


def share_out(
    proportions: Mapping[str, float] | None, domains: Iterable[str]
) -> tuple[dict[str, float], list[str]]:
    """Give every domain that there is its share of 1; absent domains' shares go to the others.

    Args:
        proportions: numbers of domains, with any sum; None stands for equal shares.
        domains: names of those that the data has.

    Returns:
        Shares that add up to 1, in the order of `domains`, and the domains that are absent.

    Raises:
        SettingsError: the data has a domain without a proportion.
    """
    domains = list(domains)
    if proportions is None:
        return {domain: 1 / len(domains) for domain in domains}, []
    # By another name only where no domain has that name itself: Dolma may have wiki and wikipedia.
    own = set(domains)
    names = {ALIASES.get(name, name): name for name in proportions if name not in own}
    found = {
        domain: domain if domain in proportions else names.get(ALIASES.get(domain, domain))
        for domain in domains
    }
    unknown = [domain for domain, name in found.items() if name is None]
    if unknown:
        raise SettingsError(
            f"The proportions have no entry for {some_of(unknown)}; they name "
            f"{some_of(proportions)}. Add an entry, rename the domain's folder, or take it out."
        )
    total = sum(proportions[name] for name in found.values())
    absent = [name for name in proportions if name not in found.values()]
    return {domain: proportions[name] / total for domain, name in found.items()}, absent


def some_of(names: Iterable[str]) -> str:
    """Names with a comma between them; of many the first (a source may be named by its page)."""
    names = list(names)
    rest = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join(names[:SHOWN] + rest)


def streams_block(folder: str, shares: Mapping[str, float], remote: str | None = None) -> str:
    """Write the `streams:` block of llm-foundry's `text` dataloader.

    Args:
        folder: split, with one folder for each domain.
        shares: parts of the domains, adding up to 1.
        remote: address of the split in a remote store; `folder` is its cache then. Default: None.
    """
    with needing("Writing streams.yaml"):
        import yaml

    streams = {
        domain: {
            "local": f"{folder}/{domain}",
            "remote": remote and f"{remote}/{domain}",
            "proportion": round(100 * share, 6),  # in percent
        }
        for domain, share in shares.items()
    }
    return yaml.safe_dump({"streams": streams}, sort_keys=False)
