"""Train from a llm-foundry YAML: `composer train.py yamls/tinyllama_apex.yaml [key=value ...]`."""

import sys

from apex_composer.extras import needing

with needing("train.py"):
    from llmfoundry.command_utils import train_from_yaml

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: composer train.py <file.yaml> [key=value ...]")
    train_from_yaml(sys.argv[1], sys.argv[2:])
