"""What each way of training holds, at small sizes."""

import argparse

import memory
import pytest
import torch

SIZES = {"layers": 1, "width": 256, "channels": 512, "heads": 32, "vocabulary": 64}
SIZES |= {"batch": 1, "length": 8, "device": "cpu"}


@pytest.mark.parametrize("way", memory.WAYS)
def test_optimizer_and_copies_follow_the_share(way, monkeypatch):
    monkeypatch.setattr(memory, "SHARES", {"selected": 0.15, "half": 0.52})
    monkeypatch.setattr(memory, "RANK", 8)
    found = memory.measure(argparse.Namespace(way=way, **SIZES))
    model = memory.build(argparse.Namespace(**SIZES), torch.float32)
    total = sum(parameter.numel() for parameter in model.parameters())
    share = found["trained"] / total
    wanted = {"all": 1.0, "APEX half": 0.52, "APEX selected": 0.15}
    share_wanted = next((v for name, v in wanted.items() if way.startswith(name)), share)
    assert 0.9 * share_wanted <= share <= share_wanted
    # Two moments in float32, and a few counters of steps.
    assert 8 * found["trained"] <= found["optimizer_bytes"] <= 8.2 * found["trained"]
    assert found["peak_bytes"] >= 0
