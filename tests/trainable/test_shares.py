"""What is trained, counted by hand and met from below."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from apex_composer import Expander, find_sites
from apex_composer.trainable.check import embeddings
from apex_composer.trainable.shares import share_of

MODES = {
    "selected": {"trainable": "selected"},
    "disadvantageous": {"trainable": "disadvantageous"},
    "half": {"trainable": "half", "trainable_share": 0.9},
}


def parameters(model) -> list[torch.nn.Parameter]:
    """Those of embeddings and head."""
    return [parameter for site in embeddings(model) for parameter in site.parameters()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("expansion", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3"])
def test_the_count_is_that_of_what_is_trained(mode, expansion, model_type):
    model = tiny_model(model_type)
    settings = {"threshold": 0.25, "method": "random", "expansion": expansion, **MODES[mode]}
    expander = Expander(find_sites(model), **settings)
    expander.begin_stage()
    trained = sum(part.copy.numel() for part in expander.training.parts())
    trained += sum(f.numel() for o in expander.operators for f in o.factors)
    trained += sum(p.numel() for p in parameters(model)) if mode == "half" else 0
    assert expander.share.trained == trained
    assert expander.share.total == sum(p.numel() for p in model.parameters())
    assert f"trained {trained:,} of " in expander.share.describe()


def on_meta(**sizes) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.fixture(scope="module")
def seven_billion() -> LlamaForCausalLM:
    return on_meta()


@pytest.mark.parametrize(
    ("trainable", "threshold", "share", "counts"),
    [
        # 2.4 %: what LoRA of rank 64 trains of LLaMA-2-7B (table 5). The heads alone are 2 %.
        ("selected", 0.125, 0.024, {"heads": 1, "kv_heads": 1, "channels": 33}),
        ("disadvantageous", 0.125, 0.024, {"heads": 1, "kv_heads": 1, "channels": 240}),
        ("half", 0.1875, 0.52, {"heads": 6, "kv_heads": 6, "channels": 2064}),
        ("half", 0, 0.52, {}),
    ],
)
def test_the_papers_shares_of_llama_2_7b(seven_billion, trainable, threshold, share, counts):
    sites = find_sites(seven_billion)
    whole = parameters(seven_billion) if trainable == "half" else []
    found = share_of(trainable, sites, "auto", threshold, share, whole)
    of_layer = {n.split(".")[-1]: k for n, k in found.counts.items() if ".layers.31." in n}
    assert of_layer == counts
    assert 0.98 * share < found.trained / found.total <= share
    assert found.threshold == threshold or trainable != "half"


@pytest.mark.parametrize("trainable", ["selected", "disadvantageous"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_no_other_threshold_comes_nearer_from_below(trainable, share):
    sites = find_sites(
        on_meta(hidden_size=64, intermediate_size=960, num_hidden_layers=2, vocab_size=8)
    )
    found = share_of(trainable, sites, "auto", 0.125, share)
    others = [share_of(trainable, sites, "auto", n / 2000, None).trained for n in range(1, 1001)]
    assert found.trained == max(n for n in others if n <= share * found.total)


def test_a_share_that_cannot_be_met_is_refused_with_those_that_can(seven_billion):
    """A pair of heads in every layer is 2 % already."""
    sites = find_sites(seven_billion)
    with pytest.raises(ValueError, match=r"got 0.01, which cannot.*nearest shares are 0.0201\."):
        share_of("selected", sites, "auto", 0.125, 0.01)
    coarse = {"num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 8}
    sites = find_sites(on_meta(**coarse, vocab_size=8))
    with pytest.raises(ValueError, match="got 0.45, which cannot") as error:
        share_of("selected", sites, "auto", 0.125, 0.45)
    near = str(error.value).split("shares are ")[1].split(". Give")[0].split(" and ")
    assert len(near) == 2 and float(near[0]) < 0.9 * 0.45 < 0.45 < float(near[1])
    for share in map(float, near):
        found = share_of("selected", sites, "auto", 0.125, share)
        assert share - 1e-5 <= found.trained / found.total <= share
    with pytest.raises(ValueError, match="trainable_share: got 0.3, which cannot"):
        share_of("half", find_sites(seven_billion), "auto", 0.25, 0.3, parameters(seven_billion))
