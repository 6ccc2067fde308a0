"""The findings on machines made up for the test, and the command on this one."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from tiny_run import write_shards
from typer.testing import CliRunner

from apex_composer.cli import app
from apex_composer.tools import doctor, shared_memory
from apex_composer.tools.finding import Finding

GIGABYTE = 10**9


def found(findings) -> dict[str, tuple[str, str]]:
    return {finding.check: (finding.status, finding.text) for finding in findings}


def test_a_cpu_needs_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found(doctor.check_gpu({}))["GPU"][0] == "warning"
    status, text = found(doctor.check_gpu({"precision": "amp_bf16"}))["GPU"]
    assert status == "failure" and "the YAML says amp_bf16" in text


def test_flash_attention_is_needed_only_where_it_is_asked_for(monkeypatch):
    config = {"model": {"attn_implementation": "flash_attention_2"}}
    for installed, status in ((None, "failure"), ("2.7.4", "ok")):
        monkeypatch.setattr(doctor, "installed_version", lambda package, found=installed: found)
        assert "flash-attn" not in found(doctor.check_gpu({}))
        assert found(doctor.check_gpu(config))["flash-attn"][0] == status


def test_the_backend_is_started(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert list(doctor.check_distributed()) == [
        Finding("distributed", "ok", "gloo starts and reduces")
    ]


@pytest.mark.parametrize(
    ("program", "seconds", "told"),
    [
        ("raise OSError('no interface')", 60.0, "OSError: no interface"),
        ("while True: pass", 0.1, "no answer within 0 s"),
    ],
)
def test_a_backend_that_fails_or_hangs_is_reported(monkeypatch, program, seconds, told):
    run = subprocess.run

    def instead(command, **options):
        return run([command[0], "-c", program], **options)

    monkeypatch.setattr(doctor.subprocess, "run", instead)
    monkeypatch.setenv("WORLD_SIZE", "8")
    finding, stray = doctor.check_distributed(seconds)
    assert finding.status == "failure" and told in finding.text and "SOCKET_IFNAME" in finding.text
    assert "WORLD_SIZE are set in this shell" in stray.text


@pytest.mark.parametrize(("free", "status"), [(GIGABYTE // 16, "warning"), (16 * GIGABYTE, "ok")])
def test_a_small_shared_memory_is_reported(monkeypatch, free, status):
    usage = SimpleNamespace(free=free, total=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert found(doctor.check_shared_memory())["/dev/shm"][0] == status


def test_disks(monkeypatch):
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: GIGABYTE)
    report = found(doctor.check_disk_space({"save_folder": "runs/x"}))
    assert report["disk: save_folder"] == (
        "warning",
        "1.0 GB free in runs/x. `apex-composer plan` tells what the checkpoints need",
    )
    assert "disk: save_folder" not in found(doctor.check_disk_space({"save_folder": "s3://b/x"}))


def test_data(tmp_path):
    write_shards(tmp_path / "a", samples=2)
    streams = {"a": {"local": str(tmp_path / "a"), "remote": None}}
    config = {"train_loader": {"dataset": {"streams": streams}}}
    assert found(doctor.check_data(config))["data"] == (
        "ok",
        "1 streams are here, 0 will be downloaded",
    )
    streams["b"] = {"local": str(tmp_path / "b"), "remote": "s3://b"}
    assert "1 will be downloaded" in found(doctor.check_data(config))["data"][1]
    streams["b"]["remote"] = None
    status, text = found(doctor.check_data(config))["data"]
    assert status == "failure" and f"b: {tmp_path / 'b'}" in text


def test_data_of_a_finetuning_loader(tmp_path):
    def check(name):
        dataset = {"hf_name": str(name), "split": "train"}
        return found(doctor.check_data({"train_loader": {"dataset": dataset}}))["data"]

    assert check("none/such")[0] == "warning"
    status, text = check(tmp_path)
    assert status == "failure" and f"{tmp_path} has no train.jsonl: prepare it" in text
    (tmp_path / "train.jsonl").touch()
    assert check(tmp_path) == ("ok", f"{tmp_path} has train")


def test_model_files(tmp_path, monkeypatch):
    def check(name):
        config = {"model": {"pretrained_model_name_or_path": str(name)}}
        return found(doctor.check_model_files(config))["model"][0]

    assert check(tmp_path) == "failure"
    (tmp_path / "config.json").write_text("{}")
    assert check(tmp_path) == "ok"
    assert check("none/such") == "failure"  # the tests run with HF_HUB_OFFLINE
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert check("none/such") == "warning"
    assert found(doctor.check_model_files({})) == {}


@pytest.fixture
def quick(monkeypatch):
    """The command with findings of the test's own."""
    findings = [Finding("data", "ok", "here")]
    monkeypatch.setattr(doctor, "examine", lambda config: findings)
    return findings


def test_the_status_tells_failures(quick):
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    quick.append(Finding("GPU", "failure", "pip install x[gpu]"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "x[gpu]" in result.output


@pytest.mark.parametrize(("answer", "left"), [("y\n", False), ("n\n", True), ("\n", True)])
def test_stale_segments_are_removed_only_on_request(quick, monkeypatch, tmp_path, answer, left):
    segment = tmp_path / "000000_locals"
    segment.write_bytes(b"....")
    for function in (shared_memory.find_stale, shared_memory.remove_stale):
        monkeypatch.setattr(function, "__defaults__", (tmp_path, tmp_path / "no processes"))
    assert segment.exists() and CliRunner().invoke(app, ["doctor"]).exit_code == 0
    assert segment.exists()
    result = CliRunner().invoke(app, ["doctor", "--clean"], input=answer)
    assert "000000_locals" in result.output.replace("\n", "")
    assert segment.exists() is left


def test_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "check_distributed", lambda: [Finding("distributed", "ok", "gloo")])
    (tmp_path / "a.yaml").write_text("precision: fp32\nsave_folder: runs\n")
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "a.yaml")], catch_exceptions=False)
    for check in ("versions", "foundry", "GPU", "distributed", "/dev/shm", "save_folder", "data"):
        assert check in result.output, check
