"""Trains a YAML on two CPU processes with FSDP2: `FSDP_VERSION=2 instruct_worker.py YAML ...`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).with_name("trainer")))

import cpu_fsdp
import torch
from forks import fork_ranks
from llmfoundry.command_utils import train

from apex_composer.tools.yaml_defaults import read_yaml


def train_rank(yaml: str, overrides: list[str]) -> None:
    """One rank."""
    torch.set_num_threads(1)
    cpu_fsdp.patch()
    train(read_yaml(Path(yaml), overrides)).close()


if __name__ == "__main__":
    sys.exit(max(map(abs, fork_ranks(2, train_rank, sys.argv[1], sys.argv[2:]))))
