"""FLOPs of training a causal language model, from its configuration.

Counted are multiply-adds of matrix products, two FLOPs each, as `torch.utils.flop_counter` does:
projections, attention and the head. Norms, biases, activations, softmax, rotary embeddings, the
lookup of embeddings and the optimizer are not.

Of attention the full square of a sequence counts, the half that the causal mask hides too: so do
PaLM (arXiv 2204.02311, appendix B), Composer and llm-foundry, and numbers that are compared must
count alike. Where a layer looks back over a window only, every token has that many keys (or the
sequence's length, if that is less). Padding counts, as it is computed; samples that are packed into
one row count as one sequence. What activation checkpointing computes again does not count: that is
what tells model FLOPs (MFU) from hardware FLOPs (HFU).

Shape legend
    s        tokens of a sequence
    d        width of the model
    a        heads * head size, k: KV heads * head size
    f        channels of an FFN
    V        vocabulary
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apex_composer.model.architectures import ARCHITECTURES

# MPT's kinds of FFN, and whether they are gated.
_MPT_FFNS = {"mptmlp": False, "mptglu": True}
_MPT_KV_HEADS = {"multihead_attention": None, "multiquery_attention": 1}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model whose layers are alike, but for the windows of their attention.

    Attributes:
        width: d.
        attention: outputs of `queries` (a), `keys` and `values` (k each).
        ffn: outputs of `up`, and of `gate` where there is one (f each).
        windows: of every layer, the keys that a token sees at most; None for the whole sequence.
        vocabulary: V.
        parallel: whether attention and FFN of a layer read the same input. Default False.
    """

    width: int
    attention: dict[str, int]
    ffn: dict[str, int]
    windows: tuple[int | None, ...]
    vocabulary: int
    parallel: bool = False

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer: d (2 a + 2 k + 2 f), or 3 f with a gate."""
        outputs = [*self.attention.values(), *self.ffn.values()]
        return self.width * (sum(outputs) + self.attention["queries"] + self.ffn["up"])


@dataclass(frozen=True)
class LayerTraining:
    """What is trained of one layer.

    Attributes:
        weights: parts whose matrix is trained, of `queries`, `keys`, `values`, `output`, `up`,
            `gate`, `down`.
        biases: parts with a trained bias.
        norms: whether a norm is. It is taken for the one at the layer's entrance.
        adapters: numbers in A and B of LoRA on a projection, by the first part of it.
    """

    weights: frozenset[str] = frozenset()
    biases: frozenset[str] = frozenset()
    norms: bool = False
    adapters: Mapping[str, tuple[int, int]] | None = None


@dataclass(frozen=True)
class Training:
    """What is trained of a model.

    Attributes:
        embeddings: whether anything before the first layer is.
        layers: by their number; one that is missing is frozen.
        final_norm: whether the norm before the head is.
        head: whether the head's matrix is.
    """

    embeddings: bool = False
    layers: Mapping[int, LayerTraining] | None = None
    final_norm: bool = False
    head: bool = False


@dataclass(frozen=True)
class Flops:
    """FLOPs of a model; called with a batch, as Composer's speed_monitor calls `flops_per_batch`.

    Of a sequence of s tokens: per_token * s + sum of c * s * min(s, keys) over `attention`.

    Attributes:
        per_token: of what does not depend on the sequence's length.
        attention: pairs of (keys that a token sees at most or None, c).
    """

    per_token: int
    attention: tuple[tuple[int | None, int], ...]

    def of_sequence(self, length: int) -> int:
        """FLOPs of one sequence.

        Args:
            length: tokens.
        """
        seen = [c * (length if keys is None else min(keys, length)) for keys, c in self.attention]
        return length * (self.per_token + sum(seen))

    def __call__(self, batch: Mapping[str, Any]) -> int:
        """FLOPs of one rank's batch.

        Args:
            batch: with `input_ids`, [sequences, tokens].
        """
        sequences, length = batch["input_ids"].shape[:2]
        return sequences * self.of_sequence(length)


def training_flops(config: Any, training: Training | None = None) -> Flops:
    """FLOPs of forward and backward pass.

    Everything trained, without windows, a sequence of s tokens takes

        6 s [layers * d (2 a + 2 k + 2 f) + d V] + 12 s^2 layers * a     (3 f for a gated FFN):

    2 for the forward pass, 2 for the gradient of a product's weights (or attention's second factor)
    and 2 for that of its input. Of what is frozen the weights' gradients are left out, and the
    inputs' gradients up to the first trained parameter: autograd computes no others. The one upper
    bound: where all before a layer is frozen and a norm of it is trained, that is taken for the
    norm at its entrance. One that stands behind attention or before the FFN alone (the second of
    Llama's) makes attention's input gradients of this one layer be counted too much.

    llm-foundry's own count for MPT, which stays as it is, is larger by 6 for every number in norms,
    biases and position embeddings, and does not know windows, nor frozen weights.

    Args:
        config: configuration of a model in docs/models.md, of Hugging Face or llm-foundry, or a
            mapping as its `to_dict()` gives.
        training: what is trained. Default None: everything.

    Raises:
        ValueError: the architecture is not known.

    Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
    """
    shape = read_shape(config)
    training = _everything(shape) if training is None else training
    tokens, attention, needed = 0, dict[int | None, int](), training.embeddings
    for number, window in enumerate(shape.windows):
        layer = (training.layers or {}).get(number, LayerTraining())
        products, pairs, needed = _count_layer(shape, layer, needed)
        tokens += products
        attention[window] = attention.get(window, 0) + pairs
    needed = needed or training.final_norm
    tokens += 2 * shape.width * shape.vocabulary * (1 + needed + training.head)
    return Flops(tokens, tuple(attention.items()))


def forward_flops(config: Any) -> Flops:
    """FLOPs of a forward pass alone; see `training_flops`."""
    return training_flops(config, Training())


def _everything(shape: ModelShape) -> Training:
    parts = frozenset([*shape.attention, "output", *shape.ffn, "down"])
    layers = dict.fromkeys(range(len(shape.windows)), LayerTraining(parts, norms=True))
    return Training(True, layers, True, True)


def _count_layer(shape: ModelShape, layer: LayerTraining, needed: bool) -> tuple[int, int, bool]:
    """FLOPs for each token, for each pair of tokens, and whether the output needs a gradient."""
    total = 0

    def project(part: str, weights: int, needed: bool) -> bool:
        """A product y = W x, whose input needs a gradient or not; whether y needs one."""
        nonlocal total
        own = part in layer.weights
        total += 2 * weights * (1 + own + needed)
        first, second = (layer.adapters or {}).get(part, (0, 0))
        total += 2 * first * (2 + needed) + 2 * second * 3
        return needed or own or part in layer.biases or first > 0

    entrance = needed or layer.norms
    width, own = shape.width, shape.attention
    q, k, v = (project(part, width * own[part], entrance) for part in ("queries", "keys", "values"))
    # S = Q K^T and S V: 2 a FLOPs a pair each, and for the gradient of each factor.
    pairs = 2 * own["queries"] * (2 + q + k + (q or k) + v)
    attended = project("output", width * own["queries"], q or k or v)
    reaches = entrance if shape.parallel else entrance or attended
    hidden = [project(part, width * outputs, reaches) for part, outputs in shape.ffn.items()]
    down = project("down", width * shape.ffn["up"], any(hidden))
    return total, pairs, attended or down


def read_shape(config: Any) -> ModelShape:
    """The sizes of a model.

    Args:
        config: as of `training_flops`.

    Raises:
        ValueError: the architecture is not known.
    """
    model_type = _field(config, "model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"FLOPs: model_type {model_type!r} is not known, known are: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    if model_type == "mpt":
        return _mpt_shape(config)
    if _field(config, "text_config") is not None:  # the language model of one with images
        return read_shape(_field(config, "text_config"))
    width = _field(config, "hidden_size", "n_embd")
    heads = _field(config, "num_attention_heads", "n_head")
    size = _field(config, "head_dim") or width // heads
    kv_heads = _field(config, "num_key_value_heads") or heads
    channels = _field(config, "intermediate_size", "n_inner") or 4 * width
    gated = any("gate" in parts.split() for parts in ARCHITECTURES[model_type].ffn.values())
    return ModelShape(
        width,
        _attention(heads * size, kv_heads * size),
        dict.fromkeys(("up", "gate") if gated else ("up",), channels),
        _windows(config, model_type, _field(config, "num_hidden_layers", "n_layer")),
        _field(config, "vocab_size"),
        model_type == "gpt_neox" and bool(_field(config, "use_parallel_residual")),
    )


def _mpt_shape(config: Any) -> ModelShape:
    """llm-foundry's MPT, or that of Hugging Face, which has multi-head attention and plain FFNs."""
    width, heads, layers = (_field(config, name) for name in ("d_model", "n_heads", "n_layers"))
    attention, ffn = _field(config, "attn_config"), _field(config, "ffn_config")
    channels, kv_heads, window, kind = 4 * width, heads, None, "mptmlp"
    if ffn is not None:
        kind = _field(ffn, "ffn_type")
        channels = _field(ffn, "ffn_hidden_size") or int(width * _field(config, "expansion_ratio"))
        grouped = _field(attention, "kv_n_heads")
        kv_heads = _MPT_KV_HEADS.get(_field(attention, "attn_type"), grouped) or heads
        sliding = _field(attention, "sliding_window_size")
        window = None if sliding in (None, -1) else sliding + 1  # besides itself
    if kind not in _MPT_FFNS or _field(config, "block_overrides"):
        raise ValueError(
            f"FLOPs: an MPT with ffn_type {kind!r} and block_overrides "
            f"{_field(config, 'block_overrides')!r} is not known, known are: "
            f"{', '.join(_MPT_FFNS)}, without block_overrides"
        )
    size = width // heads
    return ModelShape(
        width,
        _attention(heads * size, kv_heads * size),
        dict.fromkeys(("up", "gate") if _MPT_FFNS[kind] else ("up",), channels),
        (window,) * layers,
        _field(config, "vocab_size"),
    )


def _attention(queries: int, keys: int) -> dict[str, int]:
    return {"queries": queries, "keys": keys, "values": keys}


def _windows(config: Any, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Of every layer the keys that a token sees at most."""
    window, kinds = _field(config, "sliding_window"), _field(config, "layer_types")
    first = 0
    if kinds is not None:  # transformers from 4.53 on
        sliding = [kind == "sliding_attention" for kind in kinds]
    elif model_type == "gemma2":
        sliding = [number % 2 == 0 for number in range(layers)]
    elif model_type == "gemma3_text":
        pattern = _field(config, "sliding_window_pattern")
        sliding = [(number + 1) % pattern != 0 for number in range(layers)]
    else:
        if model_type in ("qwen2", "qwen3"):
            on = _field(config, "use_sliding_window")
            first = _field(config, "max_window_layers") if on else layers
        sliding = [number >= first for number in range(layers)]
    return tuple(window if slides else None for slides in sliding)


def _field(config: Any, *names: str) -> Any:
    """The first of the fields that a configuration has; None without any."""
    for name in names:
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if found is not None:
            return found
    return None
