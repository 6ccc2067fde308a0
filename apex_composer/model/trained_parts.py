"""What of a model is trained, as the count of FLOPs wants to know it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from apex_composer.model.find_sites import find_config, find_sites
from apex_composer.model.flops import Flops, LayerTraining, Training, read_shape, training_flops
from apex_composer.model.sites import Site, clean_name

# Parts by the unit along them and by whether they are a projection's outputs, in a model's order.
_PARTS = {
    ("head", True): ["queries"],
    ("kv_head", True): ["keys", "values"],
    ("head", False): ["output"],
    ("channel", True): ["up", "gate"],  # which is which does not matter: they have one size
    ("channel", False): ["down"],
}
_KINDS = {"weight": "weight", "base_layer.weight": "weight", "bias": "bias"}
_KINDS |= {"base_layer.bias": "bias", "lora_A.default.weight": "A", "lora_B.default.weight": "B"}
# Norms of what a projection gives: they change it, as its bias does.
_QK_NORMS = {"q_norm": ("queries",), "k_norm": ("keys",)}
# Modules of models with images, which text does not pass through.
_VISION = ("vision_tower", "multi_modal_projector")


@dataclass(frozen=True)
class Role:
    """What a parameter is.

    Attributes:
        kind: `weight`, `bias`, or `A` or `B` of LoRA, of a projection; a layer's `norm`; outside of
            the layers `embedding`, `tied` (embedding and head), `head`, `final` (norm) or `none`.
        layer: number of the layer.
        parts: of the projection.
        size: numbers in it.
    """

    kind: Literal["weight", "bias", "A", "B", "norm", "embedding", "tied", "head", "final", "none"]
    size: int
    layer: int = -1
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Roles:
    """A plain model's configuration, and the roles of its parameters by their clean names."""

    config: Any
    of: Mapping[str, Role]

    def flops(self, trained: Collection[str]) -> Flops:
        """FLOPs of training.

        Args:
            trained: clean names of all parameters that have gradients.

        Raises:
            ValueError: a part of an adapter has none.
        """
        roles = [role for name, role in self.of.items() if name in trained]
        kinds = {role.kind for role in roles}
        numbers = {role.layer for role in roles if role.layer >= 0}
        layers = {number: _layer([r for r in roles if r.layer == number]) for number in numbers}
        frozen = [n for n, r in self.of.items() if r.kind in ("A", "B") and n not in trained]
        if frozen:
            raise ValueError(f"FLOPs: {frozen[0]} of an adapter is frozen, known are trained ones")
        training = Training(
            embeddings=bool(kinds & {"embedding", "tied"}),
            layers=layers,
            final_norm="final" in kinds,
            head=bool(kinds & {"head", "tied"}),
        )
        return training_flops(self.config, training)


def find_roles(model: nn.Module) -> Roles:
    """Read a model, and compare it with the configuration that its FLOPs are counted by.

    Args:
        model: not wrapped yet, on any device; with LoRA or without.

    Raises:
        ValueError: the architecture is not known, or the model has matrices that the configuration
            does not tell: their FLOPs would be left out.
    """
    sites = find_sites(model)
    config = find_config(model)
    layers, modules = _layers(model, sites), _modules(model, sites)
    ends, of = _ends(model), {}
    for name, parameter in model.named_parameters():
        name = clean_name(name)
        projection = next((m for m in _above(name) if m in modules), None)
        layer = next((layers[m] for m in _above(name) if m in layers), None)
        if projection is not None:
            kind = _KINDS.get(name.removeprefix(f"{projection}."))
            parts = modules[projection]
        elif (norm := name.rpartition(".")[0].rpartition(".")[2]) in _QK_NORMS:
            kind, parts = "bias", _QK_NORMS[norm]
        else:
            kind, parts = _other(name, parameter, layer, ends), ()
        if kind is None:
            raise ValueError(
                f"FLOPs: {name} {list(parameter.shape)} is no matrix that is known, known are "
                "those of attention and FFN, LoRA on them, embeddings and head"
            )
        of[name] = Role(kind, parameter.numel(), -1 if layer is None else layer, parts)
    _check_sizes(config, of.values(), len(set(layers.values())))
    return Roles(config, of)


def _layer(roles: Collection[Role]) -> LayerTraining:
    def parts(kind: str) -> frozenset[str]:
        return frozenset(part for role in roles if role.kind == kind for part in role.parts)

    sizes = {kind: {r.parts[0]: r.size for r in roles if r.kind == kind} for kind in "AB"}
    return LayerTraining(
        parts("weight"),
        # LoRA on a fused projection changes all of its parts.
        parts("bias") | parts("A") | parts("B"),
        any(role.kind == "norm" for role in roles),
        {part: (size, sizes["B"][part]) for part, size in sizes["A"].items()},
    )


def _layers(model: nn.Module, sites: Collection[Site]) -> dict[str, int]:
    """Numbers of the layers by name."""
    known, found = {site.module for site in sites}, {}
    for name, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList):
            for layer, module in enumerate(layers):
                if not known.isdisjoint(module.modules()):
                    found[clean_name(f"{name}.{layer}")] = layer
    return found


def _modules(model: nn.Module, sites: Collection[Site]) -> dict[str, tuple[str, ...]]:
    """The parts of each projection by its name."""
    names = {module: clean_name(name) for name, module in model.named_modules() if name}
    found: dict[str, tuple[str, ...]] = {}
    seen: dict[tuple, int] = {}
    for site in sites:
        key = site.group.name, site.group.unit, site.axis == int(site.transposed)
        parts, place = _PARTS[key[1:]], seen.get(key, 0)
        seen[key] = place + 1
        found[names[site.module]] = (*found.get(names[site.module], ()), parts[place])
    return found


class _Ends(NamedTuple):
    """Where a model begins and ends."""

    embeddings: set[nn.Parameter]
    inputs: nn.Parameter
    head: nn.Parameter


def _ends(model: nn.Module) -> _Ends:
    """Weights of all embeddings, of the tokens' among them, and of the head."""
    found = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if callable(getattr(module, "get_output_embeddings", None)):
            both = module.get_input_embeddings(), module.get_output_embeddings()
            if both[1] is not None:
                return _Ends(found, both[0].weight, both[1].weight)
    raise ValueError("FLOPs: the model does not tell its head (get_output_embeddings)")


def _other(name: str, parameter: nn.Parameter, layer: int | None, ends: _Ends) -> str | None:
    """The kind of a parameter that belongs to no projection; None for one that is not known."""
    if any(part in _VISION for part in name.split(".")):
        return "none"
    if "lora_" in name or "modules_to_save" in name or "original_module" in name:
        return None
    if layer is not None:
        return "norm" if parameter.dim() == 1 else None
    if parameter is ends.head:
        return "tied" if ends.inputs is ends.head else "head"
    if parameter.dim() == 1:  # a bias of the head comes after all products
        return "none" if name.endswith("lm_head.bias") else "final"
    return "embedding" if parameter in ends.embeddings else None


def _above(name: str) -> list[str]:
    """Names of the modules that a parameter lies in, from the inside."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]


def _check_sizes(config: Any, roles: Collection[Role], layers: int) -> None:
    shape = read_shape(config)
    found = sum(role.size for role in roles if role.kind == "weight")
    head = [role.size for role in roles if role.kind in ("head", "tied")]
    expected = len(shape.windows) * shape.layer_weights, [shape.width * shape.vocabulary]
    if (found, head) != expected or layers != len(shape.windows):
        raise ValueError(
            f"FLOPs: the model has {layers} layers with matrices of {found:,} numbers and a head "
            f"of {sum(head):,}, its configuration tells {len(shape.windows)} with {expected[0]:,} "
            f"and {expected[1][0]:,}"
        )
