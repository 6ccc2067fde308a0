"""What a checkpoint tells of the settings that its run was trained with."""

from pathlib import Path

import pytest

from apex_composer.tools.checkpoint_file import CheckpointFile
from apex_composer.tools.parent_checks import check_batches, check_rate

YAML = Path("run.yaml")


def parent(rates=((1e-3, 3e-3),), **clock) -> CheckpointFile:
    return CheckpointFile(Path("c.pt"), {}, {"batch": 10, "epoch": 0, **clock}, None, list(rates))


def test_a_rate_is_that_of_one_of_the_param_groups():
    for rate in (3e-3, None, "auto"):
        check_rate(parent(), rate, YAML)
    check_rate(parent([]), 1.0, YAML)  # without an optimizer nothing is known
    check_rate(parent([(1e-3, 1e-3), (2e-2, 2e-2)]), 2e-2, YAML)
    with pytest.raises(ValueError, match="optimizer.lr: run.yaml says 0.001, but c.pt was .*0.003"):
        check_rate(parent(), 1e-3, YAML)


def test_a_batch_size_is_one_that_leads_to_the_clock():
    check_batches(parent(sample=40), 4, YAML)
    check_batches(parent(sample=40), None, YAML)
    check_batches(parent(sample=0, batch=0), 64, YAML)
    check_batches(parent(sample=37, epoch=1), 4, YAML)  # an epoch's last batch had one sample
    for sample, epoch in ((40, 0), (35, 1), (36, 0)):
        size = 64 if sample == 40 else 4
        with pytest.raises(ValueError, match=f"says {size}, but .* {sample} samples in 10 batches"):
            check_batches(parent(sample=sample, epoch=epoch), size, YAML)
