"""From one YAML to the complete llm-foundry configuration of every run, and what it is known by."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_composer.demo.configuration import DEFAULT_YAML as DEMO_YAML
from apex_composer.settings import check_choice

if TYPE_CHECKING:
    from omegaconf import DictConfig

Settings = dict[str, Any]

DEFAULT_YAML = DEMO_YAML.with_name("compare.yaml")
FOLDER, RUNS = "compare", "runs"
# Here a method may replace what the shared part has, so it must be able to leave keys of it out.
REPLACED = ("optimizer", "scheduler")


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Args:
        method: its name in the YAML.
        seed: the configuration's.
        folder: what belongs to it.
        settings: a complete llm-foundry configuration.
        identity: hash of these and of all that the run reads.
    """

    method: str
    seed: int
    folder: Path
    settings: Settings
    identity: str

    @property
    def name(self) -> str:
        """For people: `full, seed 17`."""
        return f"{self.method}, seed {self.seed}"


def choose_methods(template: "DictConfig", only: Sequence[str] = ()) -> list[str]:
    """The names of the methods to run, in the YAML's order: one that is the best of others none.

    Args:
        template: as `apex_composer.demo.configuration.load_template` returns it.
        only: those that are wanted. Default: all.

    Raises:
        ValueError: for a name that the YAML does not have; the message proposes the nearest.
    """
    known = list(template.methods)
    for name in only:
        check_choice("--only", name, known)
    wanted = {run for name in only or known for run in best_of(template, name) or [name]}
    return [name for name in known if name in wanted]


def best_of(template: "DictConfig", method: str) -> list[str]:
    """The methods of which one is the best on the first seed's held-out data; else none."""
    return list(template.methods[method].get("best_of", []))


def build_runs(
    template: "DictConfig", methods: Sequence[str], seeds: int, precision: str, inputs: Any
) -> list[Run]:
    """Build every run, seed by seed.

    Args:
        methods: names of the YAML.
        seeds: how many, counted on from the YAML's.
        precision: `fp32` on a CPU, `amp_bf16` on a GPU.
        inputs: what describes data and base model, and the packages' versions: plain data.
    """
    first = int(template.shared.seed)
    return [
        _build_run(template, method, seed, precision, inputs)
        for seed in range(first, first + seeds)
        for method in methods
    ]


def _build_run(template: "DictConfig", method: str, seed: int, precision: str, inputs: Any) -> Run:
    folder = Path(template.variables.out) / FOLDER / RUNS / method / f"seed{seed}"
    settings = build_settings(template, method, seed, precision, folder)
    return Run(method, seed, folder, settings, identify(settings, inputs))


def build_settings(
    template: "DictConfig", method: str, seed: int, precision: str, folder: Path
) -> Settings:
    """The complete configuration of one run, all references resolved.

    Raises:
        ValueError: methods are like one another in a circle, or like one that the YAML lacks.
    """
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(
        *({"variables": template.variables}, template.shared, *blocks(template, method)),
        {"seed": seed, "run_name": method, "precision": precision},
        {"variables": {"run": str(folder)}},
    )
    settings = OmegaConf.to_container(merged, resolve=True)
    # All references are resolved; what a method says of itself there is the job's to read.
    own = settings.pop("variables").keys() - template.variables.keys()
    settings["variables"] = {key: merged.variables[key] for key in own}
    for section in REPLACED:
        settings[section] = {k: v for k, v in settings[section].items() if v is not None}
    return settings


def blocks(template: "DictConfig", method: str) -> list["DictConfig"]:
    """A method's block, behind those of the methods that it is like."""
    found, name = [], method
    while name is not None:
        check_choice(
            f"methods.{method}.like", name, [n for n in template.methods if n not in found]
        )
        found.insert(0, name)
        name = template.methods[name].get("like")
    return [_without(template.methods[name], "like") for name in found]


def _without(block: "DictConfig", key: str) -> "DictConfig":
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(block)
    content.pop(key, None)
    return OmegaConf.create(content)


def identify(settings: Settings, inputs: Any) -> str:
    """A hash of all that decides a run's numbers."""
    content = json.dumps([settings, inputs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
