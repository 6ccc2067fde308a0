import sys
from types import SimpleNamespace

import torch
from torch import nn

from apex_composer.compare import worker
from apex_composer.compare.worker import trained_share


class Adapted(nn.Module):
    """A frozen layer of 16 weights with 4 + 4 added ones."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.q_proj = nn.ModuleDict({"lora_A": nn.Linear(4, 1, bias=False)})
        self.q_proj["lora_B"] = nn.Linear(1, 4, bias=False)


def test_a_method_tells_its_share_and_otherwise_what_is_not_frozen_counts():
    assert trained_share(nn.Linear(4, 4), {}) == 1.0
    half = nn.Linear(4, 4)
    half.bias.requires_grad_(False)
    assert trained_share(half, {"loss/train/total": 3.0}) == 16 / 20
    assert trained_share(half, {"gmt/trained_share": torch.tensor(0.5)}) == 0.5
    assert trained_share(Adapted(), {}) == 8 / 16


def test_the_average_is_that_of_the_kept_checkpoints_and_is_evaluated(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    from apex_composer import tools

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=9, num_attention_heads=1, num_key_value_heads=1, **sizes)
    models = [LlamaForCausalLM(config) for _ in range(2)]
    for name in ("ba16.pt", "ba8.pt", "ba4.pt"):  # the first of an earlier, longer run
        (tmp_path / name).touch()
    (tmp_path / "latest-rank0.pt").symlink_to("ba8.pt")
    merged = []

    def merge(paths, out, *, overwrite):
        merged.extend(path.name for path in paths)
        models[1].save_pretrained(out)

    monkeypatch.setitem(sys.modules, f"{tools.__name__}.merge", SimpleNamespace(merge=merge))
    evaluated = []
    trainer = SimpleNamespace(
        state=SimpleNamespace(model=SimpleNamespace(model=models[0])),
        eval=lambda: evaluated.append(True),
        saved_checkpoints=[str(tmp_path / name) for name in ("ba4.pt", "ba8.pt")],
    )
    worker.evaluate_average(trainer, tmp_path / "averaged")
    assert merged == ["ba4.pt", "ba8.pt"] and evaluated == [True]
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
