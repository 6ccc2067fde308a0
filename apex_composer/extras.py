"""The extras of the package: what each brings, and the error where one is missing.

The core and the light commands need none of them (`dependencies` in pyproject.toml).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

# What the project itself imports of each, by the names that Python knows. `foundry` brings those
# of `prep` and `remote` too; what needs several asks for the smallest that has it.
EXTRAS = {
    "foundry": (
        "composer",
        "llmfoundry",
        "omegaconf",
        "accelerate",
        "matplotlib",
        "jinja2",
        "peft",
        "safetensors",
    ),
    "prep": (
        "pyarrow",
        "orjson",
        "isal",
        "xxhash",
        "joblib",
        "yaml",
        "tokenizers",
        "transformers",
        "huggingface_hub",
    ),
    "remote": ("streaming",),
    "ray": ("ray",),
    "gpu": ("flash_attn",),
    "optimizers": ("pytorch_optimizer",),
    "eval": ("lm_eval", "datasets"),
}
# What Composer and llm-foundry are tested on. pyproject.toml refuses others when pip installs.
PYTHONS = "Python 3.10 to 3.12"
NEWEST_PYTHON = (3, 12)


class MissingExtraError(ImportError):
    """Something needs a package that is not installed; the message says which extra brings it."""


def missing_packages(extra: str) -> list[str]:
    """Those of an extra's packages that are not installed; none of them is imported."""
    return [name for name in EXTRAS[extra] if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    """A folder that has a package's name by chance (a clone of its repository) is none."""
    try:
        spec = find_spec(name)
    except ValueError:  # a module made by hand stands in for it
        return False
    return spec is not None and spec.origin is not None


def installation(extra: str) -> str:
    """The command that installs an extra, and on which Python."""
    command = f"pip install 'apex-composer[{extra}]'"
    if extra not in ("foundry", "gpu", "optimizers", "eval"):
        return command
    here = "{}.{}".format(*sys.version_info[:2])
    told = f"; this is {here}" if sys.version_info[:2] > NEWEST_PYTHON else ""
    return f"{command} ({PYTHONS}{told})"


def require(what: str, extra: str) -> None:
    """Refuse to begin what would fail later for want of an extra.

    Args:
        what: name of that which needs it, as the beginning of a sentence.
        extra: key of `EXTRAS`.

    Raises:
        MissingExtraError: naming the packages and the command.
    """
    missing = missing_packages(extra)
    if missing:
        raise _error(what, extra, missing)


@contextmanager
def needing(what: str) -> Iterator[None]:
    """Say which extra brings a package whose import fails because it is not there.

    Only the absence of an extra's own package is translated. An error inside an installed one,
    or of something that it imports in its turn, is shown as it is.

    Args:
        what: name of that which is imported, as the beginning of a sentence.

    Raises:
        MissingExtraError: naming the package and the command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        for extra, packages in EXTRAS.items():
            if name in packages and not _is_installed(name):
                raise _error(what, extra, [name]) from error
        raise


def _error(what: str, extra: str, missing: list[str]) -> MissingExtraError:
    verb = "is" if len(missing) == 1 else "are"
    return MissingExtraError(
        f"{what} needs {', '.join(missing)}, which {verb} not installed: {installation(extra)}"
    )
