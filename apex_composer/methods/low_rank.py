"""GaLore and APOLLO: AdamW whose moments of a matrix are of a projection with few rows."""

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apex_composer import settings
from apex_composer.assessment.selection import seeded_generator
from apex_composer.methods.matrix_groups import check_matrices, check_whole
from apex_composer.methods.matrix_settings import check_values
from apex_composer.methods.method_checks import check_resumed

State = MutableMapping[str, Any]


def adamw_direction(state: State, gradient: Tensor, betas: tuple[float, float], eps: float):
    """AdamW's update before the learning rate; the moments are changed in place.

        m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,
        N = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        state: `step`, t, counted up already; `exp_avg` and `exp_avg_sq`, made where missing.
        gradient: g, of any shape, that of the moments.
        betas: b1 and b2.
        eps: added to the root.
    """
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(gradient)
    first, second = (1 - beta ** float(state["step"]) for beta in betas)
    mean = state["exp_avg"].lerp_(gradient, 1 - betas[0])
    square = state["exp_avg_sq"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    return (mean / first).div_((square / second).sqrt_().add_(eps))


class LowRankAdamW(Optimizer):
    """What GaLore and APOLLO have in common, with W <- (1 - lr decay) W - lr u for every weight.

    With g the gradient of a matrix, transposed where it has more rows than columns, [m, n] with
    m <= n, every `update_proj_gap` steps a projection P, [r, m], is made anew; AdamW's direction N
    is that of R = P g, [r, n], whose moments go on where P changes (as in both papers). Whatever
    is no matrix to be projected is trained by AdamW: u = N of its own gradient.

    Args:
        scale: of the update of matrices.
        own: settings that the optimizer has beside these.
        params: param groups; those with `matrices: true` are projected (`matrix_groups`).
        lr: learning rate. Default 1e-3.
        betas: of AdamW. Default 0.9, 0.95.
        eps: of AdamW. Default 1e-8.
        weight_decay: times lr, as torch's AdamW. Default 0.
        rank: r, at most m is taken. Default 128.
        update_proj_gap: steps between two projections. Default 200.

    Raises:
        ValueError: for a setting out of range; where no group has matrices; in a step, for shards;
            a resumed run's, for other projections.
        TypeError: for an unknown setting.
    """

    def __init__(
        self,
        scale: float,
        own: Iterable[str],
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 128,
        update_proj_gap: int = 200,
        **unknown: Any,
    ):
        name = type(self).__name__.lower()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
        settings.check_keys(name, unknown, (*defaults, *own))
        groups = check_matrices(name, params, defaults)
        super().__init__(groups, {"matrices": False, **defaults})
        for group in self.param_groups:
            check_values(name, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group, place)
                place += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would take the checkpoint's settings of projections for its own."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            now = {name: own[name] for name in ("rank", "update_proj_gap", "scale")}
            check_resumed(type(self).__name__.lower(), {**now, **saved}, now)
        super().load_state_dict(state_dict)

    def _step(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if "step" not in state:
            state["step"] = torch.zeros(())
        state["step"] += 1
        if group["matrices"]:
            check_whole(type(self).__name__.lower(), parameter)
            tall = gradient.shape[0] > gradient.shape[1]
            update = self._project(state, gradient.T if tall else gradient, group, place)
            update = update.T if tall else update
        else:
            update = adamw_direction(state, gradient, group["betas"], group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])

    def _project(self, state: State, gradient: Tensor, group: dict[str, Any], place: int) -> Tensor:
        if (int(state["step"]) - 1) % group["update_proj_gap"] == 0:
            rank = min(group["rank"], gradient.shape[0])
            state["projection"] = self._projection(gradient, rank, place, int(state["step"]))
        projected = state["projection"] @ gradient
        direction = adamw_direction(state, projected, group["betas"], group["eps"])
        return self._update(state, gradient, projected, direction).mul_(group["scale"])


class GaLore(LowRankAdamW):
    """GaLore (arXiv 2403.03507, algorithm 2): the update is AdamW's in the projection.

        P = U[:, :r]^T of the SVD g = U S V^T,  u = scale P^T N

    Args:
        scale: of the update of matrices. Default 0.25, as in the paper. The others: `LowRankAdamW`.
    """

    def __init__(self, params: Iterable[Any], *, scale: float = 0.25, **given: Any):
        super().__init__(scale, (), params, **given)

    def _projection(self, gradient: Tensor, rank: int, place: int, step: int) -> Tensor:
        precise = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        left = torch.linalg.svd(precise, full_matrices=False).U[:, :rank]
        return left.T.contiguous().to(gradient.dtype)

    def _update(self, state: State, gradient: Tensor, projected: Tensor, direction: Tensor):
        return state["projection"].T @ direction


class APOLLO(LowRankAdamW):
    """APOLLO (arXiv 2412.05270): the whole gradient, by column as much longer as AdamW makes R.

        P ~ N(0, 1 / r),  u = scale g diag(s),  s_j = |N[:, j]| / |R[:, j]|
        and |u| at most 1.01 times the one of the step before (before scale)

    P is drawn from the seed, the step and the parameter's place, so all ranks have the same.
    APOLLO-Mini is `rank: 1, per: tensor, scale: 11.3`, with s = |N| / |R|.

    Args:
        scale: of the update of matrices. Default 1. Those not named here: `LowRankAdamW`.
        per: `channel` or `tensor`, what s is measured of. Default `channel`.
        seed: an integer of 0 or more. Default 17.
    """

    growth = 1.01  # of the norm, which the paper limits as Fira does

    def __init__(
        self,
        params: Iterable[Any],
        *,
        scale: float = 1.0,
        per: str = "channel",
        seed: int = 17,
        **given: Any,
    ):
        settings.check_choice("apollo: per", per, ("channel", "tensor"))
        self._per, self._seed = per, settings.check_not_negative("apollo: seed", seed)
        super().__init__(scale, ("per", "seed"), params, **given)

    def _projection(self, gradient: Tensor, rank: int, place: int, step: int) -> Tensor:
        generator = seeded_generator(self._seed, "apollo", place, step)
        drawn = torch.randn(rank, gradient.shape[0], generator=generator) / rank**0.5
        return drawn.to(gradient)

    def _update(self, state: State, gradient: Tensor, projected: Tensor, direction: Tensor):
        axis = 0 if self._per == "channel" else (0, 1)
        before, after = (
            torch.linalg.vector_norm(each, dim=axis, keepdim=True)
            for each in (projected, direction)
        )
        # A gradient of zeros stays one.
        update = gradient * (after / before.clamp_min(torch.finfo(before.dtype).tiny))
        norm, last = torch.linalg.vector_norm(update), state.get("norm")
        if last is not None:
            largest = torch.where(last > 0, self.growth * last, norm)
            shrunk = largest / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            update, norm = update * shrunk.clamp_max(1), torch.minimum(norm, largest)
        state["norm"] = norm
        return update
