"""All sites of a model through the stages of APEX. Plain torch: usable in any training loop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apex_composer.assessment import Assessment, GroupTotals
from apex_composer.attachment import Attachment
from apex_composer.distributed import check_same_on_all_ranks
from apex_composer.executors import Executor, check_executors, make_executors
from apex_composer.expansion import ExpansionOperator
from apex_composer.history import stage_record
from apex_composer.monarch import MonarchFactors
from apex_composer.operator_optimizer import (
    OperatorOptimizer,
    divide_gradients,
    param_group_places,
    to_cpu,
)
from apex_composer.selection import (
    Selection,
    count_by_group,
    count_selected,
    select_groups,
)
from apex_composer.settings import (
    IMPLEMENTATIONS,
    KV_HEADS,
    METHODS,
    check_choice,
    check_flag,
    check_positive,
    check_same,
    check_same_members,
    check_threshold,
)
from apex_composer.shards import reshard
from apex_composer.sites import Site, check_sites
from apex_composer.stopwatch import Stopwatch

STATE_VERSION = 1


class Expander:
    """Selects units, expands the advantageous into the disadvantageous ones, trains, fuses.

    The weights always hold the effective values W_eff[N] = W[N] + T W[P], except inside an
    optimizer step, where they hold the base weight W so that the optimizer acts on W and T
    exactly as if T were a module of the model.

    Example::

        expander = Expander(find_sites(model), threshold=0.125, seed=17)
        with expander.assessing():
            model(input_ids)                # some forward passes over training data
        expander.begin_stage()
        expander.attach(optimizer)          # from now on optimizer.step() trains T as well
        ...                                 # the training loop, unchanged
        expander.fuse()                     # or begin_stage() again, with the scores since

    Args:
        sites: of `find_sites(model)`, or some of them.
        threshold: share of units selected on each side, default 0.125.
        seed: of R and of random selections, default 17.
        kv_heads: `auto` expands KV heads where threshold * KV heads >= 1, `expand` forces at
            least one, `skip` leaves them alone. Default `auto`.
        method: `rank` (eq. 3), `average` (mean norm) or `random` (no assessment). Default `rank`.
        expansion: False selects and reports, without operators (the paper's ablation).
        operator_lr_scale: the operators' learning rate over the weights', default 1.
        implementation: `torch`, `triton` (the kernels), or `auto`: the kernels where they run.
            Default `auto`.
        device: that the model will run on; default where it is.

    Raises:
        ValueError: for a setting out of range, a group too small to select from, weights that
            cannot be expanded (not float32 or float64, tensor parallelism), or kernels that are
            asked for and cannot run.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        threshold: float = 0.125,
        seed: int = 17,
        kv_heads: str = "auto",
        method: str = "rank",
        expansion: bool = True,
        operator_lr_scale: float = 1.0,
        implementation: str = "auto",
        device: torch.device | None = None,
    ):
        check_threshold(threshold)
        check_choice("kv_heads", kv_heads, KV_HEADS)
        check_choice("method", method, METHODS)
        check_flag("expansion", expansion)
        check_positive("operator_lr_scale", operator_lr_scale, float)
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        self.threshold, self.seed, self.kv_heads = threshold, seed, kv_heads
        self.method, self.expansion, self.operator_lr_scale = method, expansion, operator_lr_scale
        self.implementation = implementation
        self.counts = count_by_group(sites, threshold, kv_heads)
        self.sites = [site for site in sites if site.group.name in self.counts]
        check_sites(self.sites)
        check_executors(self.sites, self.counts, implementation, device, expansion=expansion)
        self.groups = list({site.group.name: site.group for site in self.sites}.values())
        self.stage = -1
        self.selections: dict[str, Selection] = {}
        self.operators: list[ExpansionOperator] = []
        self.executors: list[Executor] = []
        self.history: list[dict[str, Any]] = []
        self.stopwatch = Stopwatch()
        assessed = {(g.assessed_by or g).name: g.assessed_by or g for g in self.groups}
        self.assessment = Assessment(
            [(group, count_selected(group, threshold)) for group in assessed.values()],
            self.stopwatch,
            implementation,
        )
        self._main: Optimizer | None = None
        self._attachment: Attachment | None = None
        self._optimizer: OperatorOptimizer | None = None
        self._moments: dict[str, dict[str, Any]] = {}

    @contextmanager
    def assessing(self, attention_mask: Tensor | None = None) -> Iterator[None]:
        """Count the forward passes inside the block towards the scores.

        Args:
            attention_mask: [samples, tokens], 1 for tokens that count; default all. One block
                per mask: it holds for every forward pass inside.
        """
        with self.assessment.assessing(attention_mask):
            yield

    def place_ahead(self, mlp: str, gate: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Where a fused SwiGLU puts the norms of an MLP's channels; see `FusedSwiGLU`.

        Args:
            mlp: name of the module, as in the names of sites.
            gate: the activation's gate, of its shape and dtype.
        """
        return self.assessment.place_ahead(f"{mlp}.channels", gate)

    def begin_stage(self, expansion: bool | None = None) -> None:
        """Fuse what there is, select units from the scores since the last stage, start at T = 0.

        The model computes the same function before and after, bit for bit.

        Args:
            expansion: False for a plain stage without operators; default as constructed.

        Raises:
            RuntimeError: if the method needs scores and nothing has been assessed, or if the
                ranks of a distributed run do not select the same units.
        """
        expansion = self.expansion if expansion is None else expansion
        reshard(self.sites)
        totals = self.assessment.totals()
        if self.method != "random" and not totals:
            raise RuntimeError(
                "no scores to select units from: run forward passes over training data inside "
                "`with expander.assessing():` before begin_stage()"
            )
        self.fuse()
        self.stage += 1
        before = self.selections
        self.selections = self._select(totals)
        self.history.append(stage_record(self.stage, expansion, before, self.selections, totals))
        self.assessment.reset()
        if expansion:
            self._set_operators([self._operator(site) for site in self.sites])

    def fuse(self) -> None:
        """End the stage: the weights already hold W + T, so the operators are dropped."""
        self.ensure_folded()
        self.operators, self.executors = [], []
        self._optimizer, self._moments = None, {}

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Make every `optimizer.step()` train the operators too.

        Args:
            optimizer: the user's, holding the sites' weights. Its lr, betas and eps are those
                of the operators' AdamW as well.

        Returns:
            A handle whose `remove()` undoes it.

        Raises:
            RuntimeError: if it is attached already.
            ValueError: if a site's weight is not in the optimizer.
        """
        if self._attachment is not None and self._attachment.attached:
            raise RuntimeError(
                "this expander is attached to an optimizer already, and two attachments would act "
                "twice on every step: call remove() of the first one before"
            )
        if self.expansion:
            reshard(self.sites)
            param_group_places(self.sites, optimizer)
        self._main = optimizer
        self._follow()
        self._attachment = Attachment(self, optimizer)
        return self._attachment

    def before_step(self, grad_scale: Tensor | None = None) -> None:
        """Gradients are ready: map them, and put the base weights back. Idle without operators.

        Args:
            grad_scale: what the gradients are still multiplied by (a GradScaler with a fused
                optimizer); default nothing.

        Raises:
            RuntimeError: without an attached optimizer, or if the last step was left half-way.
        """
        if not self.operators:
            return
        if self._optimizer is None:
            raise RuntimeError("no optimizer to train operators with: call attach(optimizer) first")
        if not self.folded:
            raise RuntimeError(
                "a step begins while the parameters hold base weights: the step before it failed "
                "(call ensure_folded() before the next forward pass), or the optimizer's step() "
                "calls its base class's"
            )
        with self.stopwatch.block(self._device), torch.no_grad():
            for executor in self.executors:
                executor.map_gradient()
            if grad_scale is not None:
                divide_gradients(self.operators, grad_scale)
            for executor in self.executors:
                executor.unfold()

    def after_step(self) -> None:
        """The optimizer has stepped on W: step on the factors, write the effective weights."""
        if self.folded:
            return
        with self.stopwatch.block(self._device), torch.no_grad():
            self._optimizer.step()
            for executor in self.executors:
                executor.fold()

    def ensure_folded(self) -> None:
        """Write the effective weights if a step has left the base weights behind."""
        for executor in self.executors:
            if not executor.folded:
                executor.restore()

    def relative_norms(self) -> dict[str, float]:
        """|T W[P]| / |W_eff[N]| by site (waits for the device; collective with sharded weights)."""
        return {name: x for e in self.executors for name, x in e.relative_norms().items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the weights: CPU tensors, numbers, strings.

        Collective in a distributed run: scores are summed over the ranks.
        """
        self.ensure_folded()
        moments = self._moments if self._optimizer is None else self._optimizer.state_dict()
        return {
            "version": STATE_VERSION,
            "settings": self.settings(),
            "sites": [site.name for site in self.sites],
            "stage": self.stage,
            "selections": {name: to_cpu(sets) for name, sets in self.selections.items()},
            "factors": {o.site.name: to_cpu(o.factors) for o in self.operators},
            "moments": moments,
            "scores": {
                name: [*to_cpu([t.scores, t.norm_sums]), t.samples]
                for name, t in self.assessment.totals().items()
            },
            "history": deepcopy(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; the weights must be those saved with it.

        Raises:
            ValueError: if the settings differ from the saved ones, naming both values.
        """
        check_same("apex state version", state["version"], STATE_VERSION)
        for setting, now in self.settings().items():
            check_same(setting, state["settings"].get(setting), now)
        check_same_members("sites", state["sites"], [site.name for site in self.sites])
        self.fuse()
        self.stage, self.history = state["stage"], deepcopy(state["history"])
        self.selections = {name: Selection(*sets) for name, sets in state["selections"].items()}
        self.assessment.load_totals({n: GroupTotals(*t) for n, t in state["scores"].items()})
        if state["factors"]:
            self._moments = state["moments"]
            self._set_operators(
                [self._operator(s, MonarchFactors(*state["factors"][s.name])) for s in self.sites]
            )

    def settings(self) -> dict[str, Any]:
        """The settings that a checkpoint keeps: a resumed run must have the same."""
        names = ("threshold", "seed", "kv_heads", "method", "expansion")
        return {name: getattr(self, name) for name in names}

    def remove(self) -> None:
        """Fold, and take the assessment's hooks off the model."""
        self.ensure_folded()
        self.assessment.remove()

    @property
    def folded(self) -> bool:
        """Whether the parameters hold the effective weights, as they do outside of steps."""
        return all(executor.folded for executor in self.executors)

    @property
    def _device(self) -> torch.device:
        return self.sites[0].weight.device

    def _select(self, totals: dict[str, GroupTotals]) -> dict[str, Selection]:
        values = {name: total.ranked_by(self.method) for name, total in totals.items()}
        chosen = None if self.method == "random" else values
        selections = select_groups(self.groups, self.counts, chosen, self.seed, self.stage)
        selected = {name: [t.tolist() for t in sets] for name, sets in selections.items()}
        check_same_on_all_ranks(
            f"the selection of stage {self.stage}", [self.seed, self.stage, selected]
        )
        return selections

    def _operator(self, site: Site, factors: MonarchFactors | None = None) -> ExpansionOperator:
        selection = self.selections[site.group.name]
        return ExpansionOperator(site, selection, factors, seed=self.seed, stage=self.stage)

    def _set_operators(self, operators: list[ExpansionOperator]) -> None:
        self.operators = operators
        self.executors = make_executors(operators, self.implementation)
        self._follow()

    def _follow(self) -> None:
        """Build the operators' optimizer as soon as both it and the main one can be known."""
        if self._main is not None and self.operators:
            self._optimizer = OperatorOptimizer(self.operators, self._main, self.operator_lr_scale)
            if self._moments:
                self._optimizer.load_state_dict(self._moments)
                self._moments = {}
