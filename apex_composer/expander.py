"""All sites of a model through the stages of APEX. Plain torch: usable in any training loop."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apex_composer import settings
from apex_composer.assessment.collector import Assessment
from apex_composer.assessment.selection import Selection, count_selected, select_groups
from apex_composer.assessment.stage_record import stage_record
from apex_composer.model.sites import Site
from apex_composer.operators.executors import Executor
from apex_composer.operators.factor_optimizer import to_cpu
from apex_composer.operators.operator import ExpansionOperator
from apex_composer.operators.stage_operators import StageOperators
from apex_composer.operators.step_hooks import Attachment
from apex_composer.sharding.make_executors import make_executors
from apex_composer.sharding.shards import reshard
from apex_composer.stopwatch import Stopwatch
from apex_composer.trainable.check import check_model
from apex_composer.trainable.row_operators import make_operators
from apex_composer.trainable.row_steps import attach_rows
from apex_composer.trainable.training import RowTraining

STATE_VERSION = 1


class Expander:
    """Selects units, expands the advantageous into the disadvantageous ones, trains, fuses.

    The weights always hold the effective values W_eff[N] = W[N] + T W[P], except inside an
    optimizer step, where they hold the base weight W so that the optimizer acts on W and T
    exactly as if T were a module of the model. Its moments carry over a fuse (our choice, the paper
    is silent): those of W[N] are of dLoss/dW_eff[N] all along; those of W[P] hold what came through
    T of the stage before until it has faded.

    Example::

        expander = Expander(find_sites(model), threshold=0.125, seed=17)
        with expander.assessing():
            model(input_ids)                # some forward passes over training data
        expander.begin_stage()
        expander.attach(optimizer)          # from now on optimizer.step() trains T as well
        ...                                 # the training loop, unchanged
        expander.fuse()                     # or begin_stage() again, with the scores since

    Args:
        sites: all those of `find_sites(model)`, or some of them.
        threshold: share of units selected on each side, default 0.125.
        seed: an integer of 0 or more, for R and for random selections. Default 17.
        kv_heads: `auto` expands KV heads where threshold * KV heads >= 1, `expand` forces at
            least one, `skip` leaves them alone. Default `auto`.
        method: `rank` (eq. 3), `average` (mean norm) or `random` (no assessment). Default `rank`.
        expansion: False selects and reports, without operators (the paper's ablation).
        operator_lr_scale: the operators' learning rate over the weights'. Default None: 1, with a
            warning where the optimizer's learning rates are not of Adam's size (SGD, Lion).
        implementation: `torch`, `triton` (kernels), or `auto` (where they run), the default.
        trainable: `all`; `selected`: P, N and the operators; `half`: these, embeddings and head,
            and other units at random up to the share; `disadvantageous`: N, without operators.
            Default `all`. Others: AdamW trains copies of rows, in full precision, of weights that
            may be bf16; the rest is frozen. Clip by `training.clip_grad_norm`; no GradScaler.
        trainable_share: trained parameters over all, to be met from below: by the threshold
            (`selected`, `disadvantageous`), or by the units at random (`half`, default 0.52).
        device: where the model will run; default where it is.

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
        operator_lr_scale: float | None = None,
        implementation: str = "auto",
        trainable: str = "all",
        trainable_share: float | None = None,
        device: torch.device | None = None,
    ):
        share = settings.check_trainable(trainable, trainable_share)
        settings.check_threshold(threshold, trainable)
        settings.check_choice("kv_heads", kv_heads, settings.KV_HEADS)
        settings.check_choice("method", method, settings.METHODS)
        settings.check_flag("expansion", expansion)
        scale = settings.check_lr_scale(operator_lr_scale)
        settings.check_choice("implementation", implementation, settings.IMPLEMENTATIONS)
        self.seed, self.kv_heads = settings.check_not_negative("seed", seed), kv_heads
        self.method, self.implementation = method, implementation
        self.trainable, self.trainable_share = trainable, share
        self.expansion = expansion and trainable != "disadvantageous"
        plan = threshold, kv_heads, self.expansion, implementation, device
        found = check_model(sites, *plan, trainable=trainable, trainable_share=share)
        self.sites, self.counts, self.share = found.sites, found.counts, found.share
        self.threshold = float(threshold if self.share is None else self.share.threshold)
        self.training = None if self.share is None else RowTraining(trainable, found)
        self.groups = list({site.group.name: site.group for site in self.sites}.values())
        self.stage = -1
        self.selections: dict[str, Selection] = {}
        self.history: list[dict[str, Any]] = []
        self.ranked: dict[str, Tensor] = {}  # what this stage's units were selected by, if known
        self.stopwatch = Stopwatch()
        assessed = {(g.assessed_by or g).name: g.assessed_by or g for g in self.groups}
        pairs = [(group, count_selected(group, self.threshold)) for group in assessed.values()]
        self.assessment = Assessment(pairs, self.stopwatch, implementation)
        self.attachment: Attachment | None = None
        self.running = StageOperators(scale, self.stopwatch)

    def assessing(
        self, attention_mask: Tensor | None = None, sequence_id: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Count the forward passes inside the block towards the scores.

        Args:
            attention_mask: [samples, tokens], 1 for tokens that count; default all. One block
                per mask: it holds for every forward pass inside.
            sequence_id: [samples, tokens], for packed rows: equal for the tokens of one sequence,
                negative for padding. Each sequence counts as a sample then. Default none: each
                row does.
        """
        return self.assessment.assessing(attention_mask, sequence_id)

    def begin_stage(
        self, expansion: bool | None = None, *, stage: int | None = None, batch: int | None = None
    ) -> None:
        """Fuse what there is, select units from the scores since the last stage, start at T = 0.

        The model computes the same function before and after, bit for bit.

        Args:
            expansion: False for a plain stage without operators; default as constructed.
            stage: its number, counted from 0; default the next one.
            batch: where the run stands, kept as the record's `start_batch`; default none.

        Raises:
            RuntimeError: if the method needs scores and nothing has been assessed, or if the
                ranks of a distributed run do not select the same units.
        """
        operators = self.trainable != "disadvantageous"
        expansion = self.expansion if expansion is None else expansion and operators
        reshard(self.sites)
        totals = self.assessment.totals()
        if self.method != "random" and self.groups and not totals:
            raise RuntimeError(
                "no scores to select units from: run forward passes over training data inside "
                "`with expander.assessing():` before begin_stage()"
            )
        self.fuse()
        self.stage = self.stage + 1 if stage is None else stage
        before, self.ranked = self.selections, {}
        if self.method != "random":
            self.ranked = {name: total.ranked_by(self.method) for name, total in totals.items()}
        values = self.ranked or None
        self.selections = select_groups(self.groups, self.counts, values, self.seed, self.stage)
        record = stage_record(self.stage, expansion, before, self.selections, totals)
        self.history.append(record if batch is None else {**record, "start_batch": batch})
        self.assessment.reset()
        self._begin_rows()
        if expansion and self.sites:
            self._begin({}, {})

    def _begin_rows(self, saved: Mapping[str, Any] | None = None) -> None:
        if self.training is not None:
            if saved is None:
                self.training.begin(self.selections, self.seed, self.stage)
            else:
                self.training.load_state_dict(saved)
            if self.training.optimizer is not None:
                self.running.follow(self.training.optimizer)

    def fuse(self) -> None:
        """End the stage: the weights already hold W + T, so operators go. Not inside a step."""
        self.running.settle()
        self.running.end()

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Make every `optimizer.step()` train the operators too.

        Each step needs zero_grad() and backward() before it: gradients are mapped in place. What is
        refused here is looked at again as stages begin: freeze and regroup no weights within one.

        Args:
            optimizer: the user's, holding the sites' weights. Its lr, betas, eps and maximize
                are those of the operators' AdamW as well.

        Returns:
            A handle whose `remove()` undoes it.

        Raises:
            RuntimeError: if it is attached already, or another expander of the same weights is.
            ValueError: if a site's weight or bias is not trained by the optimizer, or if the
                operators cannot follow it (settings that AdamW has not, weights of its own).
        """
        if self.attachment is not None and self.attachment.attached:
            raise RuntimeError(
                "this expander is attached to an optimizer already, and two attachments would act "
                "twice on every step: call remove() of the first one before"
            )
        reshard(self.sites)
        if self.training is not None:
            self.attachment = attach_rows(self.running, self.training, optimizer)
            return self.attachment
        if self.expansion:
            self.running.check(self.sites, optimizer)
        self.running.follow(optimizer)
        self.attachment = Attachment(self.running, self.sites, optimizer)
        return self.attachment

    def ensure_folded(self) -> None:
        """Write the effective weights if a step that failed has left the base weights behind."""
        self.running.ensure_folded()

    def relative_norms(self) -> dict[str, float]:
        """|T W[P]| / |W_eff[N]| by site (waits for the device; collective with sharded weights)."""
        return {name: x for e in self.executors for name, x in e.relative_norms().items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the weights: CPU tensors, numbers, strings.

        Collective in a distributed run: scores are summed over the ranks.
        """
        self.running.settle()
        totals = self.assessment.totals()
        return {
            "version": STATE_VERSION,
            "settings": self.settings(),
            "sites": [site.name for site in self.sites],
            "stage": self.stage,
            "selections": {name: to_cpu(sets) for name, sets in self.selections.items()},
            "factors": {o.site.name: to_cpu(o.factors) for o in self.operators},
            "moments": self.running.moments(),
            "scores": {name: [*to_cpu(t[:2]), t.samples] for name, t in totals.items()},
            "history": deepcopy(self.history),
            **({} if self.training is None else {"rows": self.training.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; the weights must be those saved with it.

        Raises:
            ValueError: if the settings differ from the saved ones, naming both values.
        """
        settings.check_same("apex state version", state["version"], STATE_VERSION)
        # Checkpoints of before there was a choice have no word of what is trained.
        saved = {"trainable": "all", "trainable_share": None, **state["settings"]}
        for setting, now in self.settings().items():
            settings.check_same(setting, saved.get(setting), now)
        settings.check_same_members("sites", state["sites"], [site.name for site in self.sites])
        self.fuse()
        self.stage, self.history, self.ranked = state["stage"], deepcopy(state["history"]), {}
        self.selections = {name: Selection(*sets) for name, sets in state["selections"].items()}
        self.assessment.load_totals(state["scores"])
        if self.training is not None and self.stage >= 0:
            self._begin_rows(state["rows"])
        if state["factors"]:
            self._begin(state["factors"], state["moments"])

    def settings(self) -> dict[str, Any]:
        """The settings that a checkpoint keeps: a resumed run must have the same."""
        names = ("trainable", "trainable_share", "threshold", "seed", "kv_heads", "method")
        return {name: getattr(self, name) for name in (*names, "expansion")}

    def remove(self) -> None:
        """Fold (see `StageOperators.recover`), and take the assessment's hooks off the model."""
        self.running.recover()
        self.assessment.remove()
        if self.training is not None and self.attachment is not None:
            self.attachment.remove()

    @property
    def operators(self) -> list[ExpansionOperator]:
        """Of the running stage; none between stages, and in a plain one."""
        return self.running.operators

    @property
    def executors(self) -> list[Executor]:
        """Who do the operators' work."""
        return self.running.executors

    def _begin(self, factors: Mapping[str, Sequence[Tensor]], moments: dict[str, Any]) -> None:
        """Operators of a stage: fresh ones, or with saved factors and moments."""
        rows = None if self.training is None else self.training.rows
        own = self.sites, self.selections, rows, factors
        operators, shards = make_operators(*own, seed=self.seed, stage=self.stage)
        executors = make_executors(operators, self.implementation, shards)
        self.running.begin(operators, executors, moments)
