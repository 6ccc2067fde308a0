"""Build the three runs' llm-foundry configurations from one YAML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_composer.demo.documents import PRETRAIN, TRAIN, VALIDATION

if TYPE_CHECKING:
    from omegaconf import DictConfig

Settings = dict[str, Any]
# Counts of sequences and more, per split and per domain that has a sequence there.
Splits = Mapping[str, Mapping[str, Mapping[str, int]]]

_PACKAGE = Path(__file__).parents[1]
# A wheel carries yamls/ inside the package; a checkout has it beside the package.
_FOLDER = _PACKAGE if (_PACKAGE / "yamls").is_dir() else _PACKAGE.parent
DEFAULT_YAML = _FOLDER / "yamls" / "demo.yaml"
# Later sections win. Vanilla and APEX share all but the last, so nothing else can differ.
SECTIONS = {
    "base": ("shared", "base"),
    "vanilla": ("shared", "continued"),
    "apex": ("shared", "continued", "apex"),
}
TRAINED = {"base": PRETRAIN, "vanilla": TRAIN, "apex": TRAIN}
# Composer's bar would leave each of its states in a log, two for every batch.
STATES_IN_LOGS = 5


def load_template(yaml: Path, out: Path, overrides: Sequence[str] = ()) -> "DictConfig":
    """Read the job's YAML and change the keys given on the command line.

    Args:
        yaml: file like `yamls/demo.yaml`.
        out: folder of the results, put in place of `variables.out`.
        overrides: `key=value` entries; only keys that the YAML has. Default: none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an override is not of the form key=value or names a key that does not exist.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not yaml.is_file():
        raise FileNotFoundError(
            f"--yaml: got {yaml}, which is no file. Leave it out, or give one like those in "
            f"{DEFAULT_YAML.parent}."
        )
    template = OmegaConf.load(yaml)
    OmegaConf.set_struct(template, True)
    for override in overrides:
        key, separator, _ = override.partition("=")
        try:
            found = separator and OmegaConf.select(template, key, throw_on_missing=True) is not None
            template = OmegaConf.merge(template, OmegaConf.from_dotlist([override]))
        except OmegaConfBaseException:
            found = False
        if not found:
            raise ValueError(
                f"{override!r} changes nothing. Give key=value with a key of {yaml}, for example "
                "variables.batches=30."
            )
    template.variables.out = str(out)
    return template


def build_configurations(
    template: "DictConfig",
    splits: Splits,
    data: Path,
    precision: str,
    is_watched: bool = True,
) -> dict[str, Settings]:
    """Build the complete configuration of every run, all references resolved.

    Args:
        template: as `load_template` returns it.
        splits: counts of the prepared data.
        data: folder of the prepared data, with `<split>/train/<domain>/`.
        precision: `fp32` on a CPU, `amp_bf16` on a GPU.
        is_watched: whether progress goes to a terminal; a log gets its state now and then.
            Default: True.

    Returns:
        One llm-foundry configuration for each of `base`, `vanilla` and `apex`.

    Raises:
        ValueError: a run has less text than a batch.
    """
    configurations = {run: _build(run, template, splits, data, precision) for run in SECTIONS}
    if not is_watched:
        for settings in configurations.values():
            batches = int(settings["max_duration"].removesuffix("ba"))
            interval = f"{max(1, batches // STATES_IN_LOGS)}ba"
            settings |= {"progress_bar": False, "log_to_console": True}
            settings["console_log_interval"] = interval
    return configurations


def training_splits(run: str, splits: Splits) -> dict[str, str]:
    """Name the split of every domain that a run trains on.

    A domain of too few documents has none for the continued runs alone: they read again what the
    base model has read of it.

    Args:
        run: `base`, `vanilla` or `apex`.
        splits: counts of the prepared data.
    """
    return {domain: split for split in (PRETRAIN, TRAINED[run]) for domain in splits[split]}


def _build(
    run: str, template: "DictConfig", splits: Splits, data: Path, precision: str
) -> Settings:
    from omegaconf import OmegaConf

    template = OmegaConf.create(OmegaConf.to_container(template))  # a copy that may grow keys
    merged = OmegaConf.merge(
        {"variables": template.variables, "precision": precision},
        *(template[section] for section in SECTIONS[run]),
    )
    settings = OmegaConf.to_container(merged, resolve=True)
    trained = training_splits(run, splits)
    sequences = sum(splits[split][domain]["sequences"] for domain, split in trained.items())
    _check_batch(run, settings, sequences)
    settings["train_loader"]["dataset"]["streams"] = _streams(data, trained)
    settings["eval_loader"] = [
        _evaluation_loader(settings["eval_loader"], data, domain) for domain in splits[VALIDATION]
    ]
    return settings


def _check_batch(run: str, settings: Settings, sequences: int) -> None:
    batch = settings["global_train_batch_size"]
    if sequences < batch:
        raise ValueError(
            f"Too little text: the run {run!r} has {sequences} sequences of "
            f"{settings['max_seq_len']} tokens, a batch takes {batch}. Add text, or lower "
            "shared.max_seq_len or shared.global_train_batch_size."
        )


def _evaluation_loader(loader: Settings, data: Path, domain: str) -> Settings:
    streams = _streams(data, {domain: VALIDATION})
    return loader | {"label": domain, "dataset": loader["dataset"] | {"streams": streams}}


def _streams(data: Path, splits: Mapping[str, str]) -> Settings:
    """Streams of local shards. Without `remote`, a killed run cannot block the next one."""
    return {
        domain: {"local": str(data / split / "train" / domain), "remote": None}
        for domain, split in splits.items()
    }
