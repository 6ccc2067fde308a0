"""A run's model as shapes without weights, and what APEX adds to it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_composer.tools.training_yaml import Settings

if TYPE_CHECKING:
    from apex_composer.trainable.check import Checked
    from apex_composer.trainable.shares import Share

# Of factors, and of rows that are trained: values, gradients and two Adam moments, in fp32.
_COPIES = 4
_BYTES = 4


@dataclass(frozen=True)
class GroupKind:
    """All groups of one kind, which in today's models are equal in every layer.

    Attributes:
        kind: `heads`, `kv_heads` or `channels`.
        groups: number of them.
        units: number in one group.
        selected: units on each side, 0 where the kind is left alone.
    """

    kind: str
    groups: int
    units: int
    selected: int


@dataclass(frozen=True)
class Cost:
    """What APEX expands in a model, and what that adds to a run.

    Attributes:
        kinds: units there are, and selected.
        sites: expanded weights.
        parameters: weights of their operators.
        memory: bytes on every GPU (without FSDP).
        fold_flops: of one step, see `operators/flops.py`.
        map_flops: of one step's gradients.
        norm_flops: of the norms for the scores, for each token.
        share: what is trained, where that is not everything.
        rows: parameters in the rows that are trained.
        whole: parameters that are trained as they are beside them (embeddings, head).
        gradients: parameters of the weights that rows are trained of: all of them, and the largest.
        trained: names of the parameters that have gradients, where not all have.
    """

    kinds: list[GroupKind]
    sites: int
    parameters: int
    memory: int
    fold_flops: int
    map_flops: int
    norm_flops: int
    share: "Share | None" = None
    rows: int = 0
    whole: int = 0
    gradients: tuple[int, int] = (0, 0)
    trained: frozenset[str] = frozenset()


def build_shapes(config: Settings) -> Any:
    """The model of a training YAML on the meta device: no weights are read or made.

    Args:
        config: configuration of `load_configuration`.

    Returns:
        A Hugging Face or MPT model, with the adapters of `peft_config`.

    Raises:
        ValueError: for models of another kind, or a configuration that cannot be found.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    settings = config["model"]
    if settings.get("name") == "mpt_causal_lm":
        from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM

        left_out = ("name", "init_device", "master_weights_dtype", "loss_fn", "use_train_metrics")
        known = {key: value for key, value in settings.items() if key not in left_out}
        with init_empty_weights():
            return MPTForCausalLM(MPTConfig(**known))
    if settings.get("name") != "hf_causal_lm":
        raise ValueError(
            f"model.name: got {settings.get('name')!r}, planned are hf_causal_lm and mpt_causal_lm"
        )
    hf_config = read_model_config(settings)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(hf_config)
        peft = settings.get("peft_config")
        return _with_adapters(model, peft) if peft else model


def _with_adapters(model: Any, settings: Settings) -> Any:
    """The model with peft's LoRA, as llm-foundry makes it, but for the first values."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{**settings, "init_lora_weights": True})
    config.peft_type, config.task_type = "LORA", str(config.task_type).upper()
    return get_peft_model(model, config)


def find_trained(model: Any, hft: Any, seed: int) -> dict[str, int]:
    """Sizes of the parameters that have gradients, by name, where no rows are trained.

    Args:
        model: result of `build_shapes`.
        hft: HFT with the run's settings, or None.
        seed: the run's.

    Raises:
        ValueError: `hft` does not know the architecture.
    """
    from apex_composer.methods.hft import untrained
    from apex_composer.model.find_sites import find_sites
    from apex_composer.model.sites import clean_name

    frozen: set[int] = set()
    if hft is not None:
        modules = untrained(find_sites(model), hft.share, seed if hft.seed is None else hft.seed)
        frozen = {id(p) for module in modules for p in module.parameters(recurse=False)}
    own = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in frozen}
    return {clean_name(name): parameter.numel() for name, parameter in own.items()}


def read_model_config(settings: Settings) -> Any:
    """A Hugging Face configuration with the YAML's overrides, from a folder, the cache or the hub.

    Args:
        settings: section `model` of the YAML.

    Raises:
        ValueError: it cannot be found.
    """
    from llmfoundry.utils.config_utils import set_config_overrides
    from transformers import AutoConfig

    name = settings.get("pretrained_model_name_or_path")
    try:
        trusted = bool(settings.get("trust_remote_code", False))
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        where = "the folder has no config.json" if Path(str(name)).is_dir() else "not reachable"
        raise ValueError(
            f"model.pretrained_model_name_or_path: {name!r} gives no configuration ({where}). Only "
            "its config.json is needed: give a local folder that holds it (key=value on the "
            "command line), or run once where the hub can be reached"
        ) from error
    set_config_overrides(config, settings.get("config_overrides") or {})
    return config


def estimate_cost(model: Any, algorithm: Any) -> Cost:
    """Parameters, memory and arithmetic of the operators and of the assessment.

    What was folded is kept until it is unfolded: n d numbers of n selected indices and d, the other
    dimension.

    Args:
        model: result of `build_shapes`.
        algorithm: APEX or S2FT with the run's settings.

    Raises:
        ValueError: the architecture is not known, or a group is too small.
    """
    from apex_composer.operators.flops import fold_flops, map_flops, norm_flops
    from apex_composer.ops.monarch import factor_pair
    from apex_composer.trainable.check import check_model

    sites = algorithm.find_sites(model)
    own = algorithm.threshold, algorithm.kv_heads, algorithm.expansion, "torch"
    trained = {name: getattr(algorithm, name) for name in ("trainable", "trainable_share")}
    found = check_model(sites, *own, **trained)
    kinds, counts, sites = _count_kinds(sites, found.counts), found.counts, found.sites
    parameters = kept = fold = gradient_map = 0
    for site in sites if algorithm.expansion else []:
        n = counts[site.group.name] * site.group.unit_size
        d = site.weight.shape[1 - site.axis]
        parameters += n * sum(factor_pair(n))
        kept += n * d
        fold += fold_flops(n, d)
        gradient_map += map_flops(n, d)
    assessed = {id(s.group.probe): s.group for s in sites if s.group.assessed_by is None}
    norms = sum(norm_flops(group.units * group.unit_size) for group in assessed.values())
    memory = _BYTES * (parameters * _COPIES + kept)
    cost = Cost(kinds, len(sites), parameters, memory, fold, gradient_map, norms)
    return cost if found.share is None else _with_rows(cost, found, model)


def _with_rows(cost: Cost, found: "Checked", model: Any) -> Cost:
    whole = sum(parameter.numel() for parameter in found.whole)
    rows = found.share.trained - whole - cost.parameters
    weights = {id(site.weight): site.weight.numel() for site in found.trained}.values()
    gradients = sum(weights), max(weights)
    own = {id(p) for site in found.trained for p in site.parameters()}
    own |= {id(parameter) for parameter in found.whole}
    names = frozenset(name for name, p in model.named_parameters() if id(p) in own)
    rest = {"whole": whole, "gradients": gradients, "trained": names}
    return replace(cost, share=found.share, rows=rows, **rest)


def count_shards(config: Mapping[str, Any], gpus: int) -> int:
    """Over how many GPUs weights, gradients and optimizer are sharded; 1 for DDP.

    Args:
        config: llm-foundry's; replicas of shards (HSDP) by `data_parallel_replicate_degree`, or by
            `data_parallel_shard_degree`.
        gpus: in all.
    """
    sharding = config.get("fsdp_config")
    if sharding is None or sharding.get("sharding_strategy") == "NO_SHARD":
        return 1
    own = sharding.get("data_parallel_shard_degree") or -1
    replicas = sharding.get("data_parallel_replicate_degree") or 1
    return max(1, min(gpus, own if own > 0 else gpus // replicas))


def row_memory(cost: Cost, parameters: int, width: int, ranks: int, shards: int) -> dict[str, int]:
    """Bytes on each GPU where only rows are trained, by what they are for.

    A weight's gradient lives until its rows are taken out of it; DDP reduces all of them at the end
    of a backward pass, by way of buckets that hold them once more.

    Args:
        cost: of the run.
        parameters: of the model.
        width: bytes of a weight.
        ranks: GPUs.
        shards: over how many of them FSDP2 shards the weights; 1 for DDP.
    """
    copied = cost.whole if width < _BYTES else 0  # as all rows of embeddings and head
    gradients = cost.gradients[1] if ranks == 1 or shards > 1 else 2 * cost.gradients[0]
    return {
        "weights": width * parameters // shards,
        "rows": _BYTES * _COPIES * (cost.rows + copied) // shards,
        "embeddings and head": 3 * width * (cost.whole - copied) // shards,
        "gradients of whole weights": width * gradients,
    }


def _count_kinds(sites: list[Any], counts: dict[str, int]) -> list[GroupKind]:
    groups = {site.group.name: site.group for site in sites}.values()
    kinds = Counter(
        (group.name.rsplit(".", 1)[-1], group.units, counts.get(group.name, 0)) for group in groups
    )
    return [GroupKind(kind, count, units, k) for (kind, units, k), count in kinds.items()]
