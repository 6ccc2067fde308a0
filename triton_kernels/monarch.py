"""Monarch fold and gradient map for all matrices of one shape at once.

Shape legend
    W  [rows, columns]  a weight;  V is W seen with the expanded axis first, V [rows, width]
    P, N [n]            rows of V: the advantageous and the disadvantageous units, n = p * q
    L [q, p, p], R [p, q, q]   the factors of T, n x n
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apex_composer.triton_kernels.availability import mark_written, on_device, require
from apex_composer.triton_kernels.monarch_checks import (
    Form,
    check_batch,
    check_gradients,
    check_moved,
)
from apex_composer.triton_kernels.monarch_launch import AddressTable, Launcher, Layout, Tables

# Enough for all 44 gate and up projections of TinyLLaMA-1.1B at once, in a training that holds more
# than 17 GB and has freed its activations by then. More would save no launches there, less would
# keep the intermediate results in the GPU's second-level cache.
SCRATCH_BYTES = 256 * 2**20


class MonarchBatch:
    """The expansion operators of weights that have one shape, stride and n in common.

    Nothing is copied but addresses: the batch reads and writes the tensors it was given, and
    looks at every call where they lie. Calls never wait for the device. Results do not depend on
    timing: no additions are atomic, and sums have a fixed order. What autograd has saved of the
    weights and gradients that are written notices it (their versions count up).

    Args:
        weights: W, each [rows, columns], float32, all of the same strides.
        lefts: L, each [q, p, p], float32.
        rights: R, each [p, q, q], float32.
        advantageous: P, each [n], int64, distinct indices along `axis`.
        disadvantageous: N, each [n], int64, distinct and disjoint from P (not checked here).
        axis: 0 expands rows, 1 columns.
        input_precision: of the products: `tf32x3` (float32 accuracy on matrix units) or `ieee`
            (float32 without them). Default `tf32x3`.
        scratch_bytes: limit of the intermediate results of a call, default 256 MiB; the matrices
            are taken in turns where it does not suffice for all, one at a time at least. Partial
            sums come on top, at most 8 KB * (n + q * q).

    Raises:
        RuntimeError: if the kernels cannot run on the weights' device, or not for such factors.
        ValueError: for tensors that do not fit together, naming the first one.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        advantageous: Sequence[Tensor],
        disadvantageous: Sequence[Tensor],
        *,
        axis: int,
        input_precision: str = "tf32x3",
        scratch_bytes: int = SCRATCH_BYTES,
    ):
        self._tensors = [list(t) for t in (weights, lefts, rights, advantageous, disadvantageous)]
        check_batch(*self._tensors, axis=axis, input_precision=input_precision)
        self._forms = [Form.of(own[0]) for own in self._tensors]
        self._settings = {
            "axis": axis,
            "input_precision": input_precision,
            "scratch_bytes": scratch_bytes,
        }
        self.device = weights[0].device
        p, q = rights[0].shape[:2]
        require(self.device, p, q)
        tables = Tables(*(AddressTable(self.device) for _ in Tables._fields))
        self._launch = Launcher(tables, Layout.of(weights[0], axis), p, q, input_precision)
        self._results: Tensor | None = None
        self._subsets: dict[tuple[int, ...], MonarchBatch] = {}

    def __len__(self) -> int:
        return len(self._tensors[0])

    @torch.no_grad()
    def fold(self, sign: int = 1) -> None:
        """W[N] <- W[N] + sign * T W[P] for every matrix, in place (paper eq. 7-12).

        W[P] does not change, so `fold(-1)` subtracts the very bits that `fold(1)` added.

        Args:
            sign: +1 folds the operators in, -1 takes them out again. Default +1.

        Raises:
            ValueError: for another sign, and where a tensor has moved and is not what it was at
                first (`model.to(dtype)`, another layout).
        """
        if sign not in (1, -1):
            raise ValueError(f"sign is {sign!r}, allowed: 1 (fold) and -1 (unfold)")
        self._look_up()
        scratch, turn = self._scratch(parts=1)
        with on_device(self.device):
            for first in range(0, len(self), turn):
                count = min(turn, len(self) - first)
                self._launch.right_product(scratch, first, count)
                self._launch.left_product(scratch, float(sign), first, count)
        mark_written(*self._tensors[0])

    @torch.no_grad()
    def map_gradient(
        self, gradients: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """dL, dR and, in place, G[P] += T^T G[N], from G = dLoss/dW_eff of every matrix.

        With X = W[P], Gy = G[N] and Z = R X as [p, q, width]:
            dL[j] = Gy[:, j] Z[:, j]^T,  dZ[:, j] = L[j]^T Gy[:, j],  dR[i] = dZ[i] X[i]^T.
        G[N] stays as it is.

        Args:
            gradients: G, each of its weight's shape and strides, float32; None where a weight
                has no gradient.

        Returns:
            dL and dR, each of its factor's shape, None where the gradient is. They are views
            into memory of the batch that the next call writes again.

        Raises:
            ValueError: for gradients that do not fit the weights, and as `fold`.
        """
        check_gradients(self._forms[0], len(self), gradients)
        self._look_up()
        if any(gradient is None for gradient in gradients):
            return self._map_some(gradients)
        self._launch.tables.gradients.update(gradients)
        size = self._launch.result_size
        if self._results is None:
            self._results = torch.empty(len(self), size, dtype=torch.float32, device=self.device)
        scratch, turn = self._scratch(parts=self._launch.scratch_parts)
        with on_device(self.device):
            for first in range(0, len(self), turn):
                count = min(turn, len(self) - first)
                self._launch.right_product(scratch[0], first, count)
                results = self._results[first : first + count]
                self._launch.backward(scratch, results, first, count)
        mark_written(*gradients)
        return self._factor_gradients()

    def _map_some(
        self, gradients: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """By a batch of the matrices that have a gradient; which ones seldom changes."""
        present = tuple(i for i, gradient in enumerate(gradients) if gradient is not None)
        lefts, rights = [None] * len(self), [None] * len(self)
        if present:
            if present not in self._subsets:
                own = ([tensors[i] for i in present] for tensors in self._tensors)
                self._subsets = {present: MonarchBatch(*own, **self._settings)}
            found = self._subsets[present].map_gradient([gradients[i] for i in present])
            for i, left, right in zip(present, *found, strict=True):
                lefts[i], rights[i] = left, right
        return lefts, rights

    def _factor_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        left_size, p, q = self._launch.left_size, self._launch.p, self._launch.q
        lefts = self._results[:, : q * p * p].unflatten(1, (q, p, p))
        rights = self._results[:, left_size : left_size + p * q * q].unflatten(1, (p, q, q))
        return list(lefts.unbind()), list(rights.unbind())

    def _scratch(self, parts: int) -> tuple[Tensor, int]:
        """Memory for [parts, turn, n, width], and how many matrices (`turn`) that is."""
        size = self._launch.scratch_size
        turn = self._settings["scratch_bytes"] // (parts * size * 4)
        turn = min(max(turn, 1), len(self))
        return torch.empty(parts, turn * size, dtype=torch.float32, device=self.device), turn

    def _look_up(self) -> None:
        found = zip(self._launch.tables, self._tensors, self._forms, strict=False)
        for place, (table, tensors, form) in enumerate(found):
            if table.has_moved(tensors):  # no tensor gets another dtype or layout where it lies
                check_moved(place, tensors, form)
                table.update(tensors)
