"""docs/clusters.md: what it tells users to write is what the installed libraries know."""

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import yaml
from composer.cli import launcher
from composer.utils.parallelism import FSDP2Config, FSDPConfig

from apex_composer.callbacks.heartbeat import Heartbeat
from apex_composer.callbacks.preemption import Preemption
from apex_composer.callbacks.start_guard import StartGuard

PAGE = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def section(heading: str) -> list[dict]:
    text = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [yaml.safe_load(b) for b in re.findall(r"^```yaml\n(.*?)^```", text, re.S | re.M)]


def test_fsdp_keys_are_composers():
    first_1b, second_1b, first_7b, second_7b = section("FSDP")
    known = {field.name for field in fields(FSDPConfig)}
    for block in (first_1b, first_7b):
        assert set(block["fsdp_config"]) <= known
        assert block["fsdp_config"]["use_orig_params"] is True
        FSDPConfig(**block["fsdp_config"])
    for block in (second_1b, second_7b):
        assert set(block["fsdp_config"]) <= FSDP2Config.settable_attrs()
        FSDP2Config(**block["fsdp_config"])
    for block in (first_1b, second_1b, first_7b, second_7b):
        assert block["fsdp_config"]["state_dict_type"] == "full"


def test_callbacks_are_this_packages():
    (block,) = section("Before the first start")
    known = {"start_guard": StartGuard, "heartbeat": Heartbeat, "preemption": Preemption}
    assert set(block["callbacks"]) == set(known)
    for name, settings in block["callbacks"].items():
        known[name](**settings).close(None, None)  # heartbeat has started its thread


def test_launch_lines_parse(monkeypatch):
    (line,) = re.findall(r"^composer (-n 8 .*)$", PAGE, re.MULTILINE)
    monkeypatch.setattr("sys.argv", ["composer", *line.split()])
    parsed = launcher._parse_args()
    assert (parsed.nproc, parsed.world_size, parsed.base_rank) == (8, 32, 0)


def test_the_shell_blocks_are_shell():
    assert len(blocks("bash")) >= 3
    for block in blocks("bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
