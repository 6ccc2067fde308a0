"""Train from a llm-foundry YAML: `composer train.py yamls/tinyllama_apex.yaml [key=value ...]`."""

import sys
from pathlib import Path

from apex_composer.extras import needing
from apex_composer.tools.yaml_defaults import read_yaml

with needing("train.py"):
    from llmfoundry.command_utils import train

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: composer train.py <file.yaml> [key=value ...]")
    train(read_yaml(Path(sys.argv[1]), sys.argv[2:]))
