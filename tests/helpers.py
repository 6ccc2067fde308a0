"""Small models and data that several tests share."""

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from apex_composer.assessment.selection import Selection
from apex_composer.model.sites import Group, Site

VOCABULARY = 64

# For trainings that different kernels do in float32. Adam divides a gradient by its own size: with
# the usual eps of 1e-8 an element whose gradient is next to zero takes a whole step in a direction
# that rounding decides, and every CPU rounds otherwise. Rounding moves a gradient of these models
# by 5e-8 at most (float32 against float64), with this eps a step by 5e-8 / 1e-4 of lr. The typical
# gradient is as large as this eps or larger, so that a step is half of lr or more: two trainings
# differ by less than a thousandth of what they change.
SMOOTH_EPS, CHANGE_BOUND = 1e-4, 1e-3


def tiny_llama(
    seed: int = 0,
    *,
    layers: int = 2,
    hidden: int = 32,
    channels: int = 24,
    heads: int = 4,
    kv_heads: int = 4,
    dtype: torch.dtype = torch.float32,
    **options,
) -> LlamaForCausalLM:
    """A Llama of a few thousand parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        attn_implementation="sdpa",
        use_cache=False,
        **options,
    )
    return exact_norms(LlamaForCausalLM(config).to(dtype))


class ExactNorm(torch.nn.Module):
    """RMS norm in the dtype of its input; transformers' goes through float32."""

    def forward(self, hidden: Tensor) -> Tensor:
        variance = hidden.square().mean(-1, keepdim=True)
        return self.weight * hidden * torch.rsqrt(variance + self.variance_epsilon)


def exact_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model's RMS norms full precision, so that float64 runs are float64 throughout."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = ExactNorm
    return model


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token loss in the logits' dtype; transformers' goes through float32."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


def tokens(samples: int, length: int = 8, seed: int = 0) -> Tensor:
    """Random token ids, [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (samples, length), generator=generator)


def next_token_loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Mean cross entropy of a causal language model on its own inputs."""
    return model(input_ids=ids, labels=ids).loss


def tiny_qwen(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights and random biases on queries, keys and values."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = exact_norms(Qwen2ForCausalLM(config).to(dtype))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def change_error(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """|found - expected| over |expected - start|: the share of a tensor's change that is wrong."""
    found, expected, start = found.detach(), expected.detach(), start.detach()
    return float((found - expected).norm() / (expected - start).norm())


class TokenDataset(Dataset):
    """Random token ids as a Hugging Face style map dataset, optionally with padding at the end.

    Args:
        samples: how many.
        length: tokens of each.
        seed: of the ids.
        padded: sample i has its last i % 4 tokens masked.
    """

    def __init__(self, samples: int, length: int = 8, seed: int = 0, padded: bool = False):
        self.ids = tokens(samples, length, seed)
        self.mask = torch.ones_like(self.ids)
        if padded:
            for i in range(samples):
                self.mask[i, length - i % 4 :] = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.ids[index].masked_fill(self.mask[index] == 0, -100)
        return {
            "input_ids": self.ids[index],
            "labels": labels,
            "attention_mask": self.mask[index],
        }


def factors_now(expander, prefix: str = "") -> list[dict]:
    """The running operators as the oracle takes them: plain names, indices and tensors."""
    found = []
    for operator in expander.operators:
        weight = operator.site.name.split("[")[0].removeprefix(prefix)
        names = [weight]
        if len(operator.site.parameters()) == 2:
            names.append(weight.removesuffix("weight") + "bias")
        found.append(
            {
                "names": names,
                "axis": operator.site.axis,
                "positive": operator.advantageous.clone(),
                "negative": operator.disadvantageous.clone(),
                "left": operator.factors.left.clone(),
                "right": operator.factors.right.clone(),
            }
        )
    return found


def linear_site(
    rows: int,
    columns: int,
    *,
    axis: int = 0,
    unit_size: int = 1,
    offset: int = 0,
    bias: bool = False,
    stride: int | None = None,
    transposed: bool = False,
    name: str = "layer.weight",
    dtype: torch.dtype = torch.float64,
) -> Site:
    """A site on a module of its own, [rows, columns], with units from `offset` to the end."""
    module = torch.nn.Linear(columns, rows, bias=bias, dtype=dtype)
    if transposed:
        module = Conv1D(columns, rows).to(dtype)
        module.bias = torch.nn.Parameter(torch.randn(columns, dtype=dtype)) if bias else None
    units = ((columns if axis else rows) - offset) // (stride or unit_size)
    group = Group("group", "channel" if unit_size == 1 else "head", units, unit_size, module)
    return Site(name, module, axis, group, offset, stride, transposed)


def selection(advantageous: list[int], disadvantageous: list[int]) -> Selection:
    """A selection of the given units."""
    return Selection(torch.tensor(advantageous), torch.tensor(disadvantageous))


def largest(values: list, count: int) -> set:
    """Places of the `count` largest values by Python's stable sort: ties to the lower index."""
    return set(sorted(range(len(values)), key=lambda place: -values[place])[:count])
