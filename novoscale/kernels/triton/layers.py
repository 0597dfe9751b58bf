"""The pass over the layers in Triton: a few launches for any number of layers and param groups.

``reference.layers`` is the definition. The table of the layers has the addresses of their state. What the
ranks tell each other is packed and unpacked here too, if it is one collective: see ``plan.Plan``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from novoscale.kernels import interface, layers
from novoscale.kernels.interface import AdvanceInputs, ByAddress
from novoscale.kernels.layers import LayerTable, OptionTable, empty_coefficients
from novoscale.kernels.shards import Coefficients
from novoscale.kernels.triton.second_moments import advance, mean_square
from novoscale.kernels.triton.verdict import begin, count, pack, verdict
from novoscale.sharding.placed import LayerTelemetry, Packing

TILE = 1024  # layers that a program does at once
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
# The same where a program has all layers of a parameter, and one has more than TILE: what waits for memory
# takes as long for many as for few. A thousand threads, the most that there may be.
MANY = {"tile": 8 * TILE, "num_warps": 16 if torch.version.hip else 32, "enable_fp_fusion": False}


class LayerKernels(ByAddress, interface.LayerKernels):
    """The pass over the layers, of which everything is on one device."""

    completes = True

    def __init__(self, table: LayerTable, device: torch.device) -> None:
        self._table, self._device = table, device
        self._parameters, self._stretches = (t.to(device) for t in (table.records, table.stretches(TILE)))
        self._share = None if table.share is None else table.share.to(device)
        self._count, self._sizes = len(table.records), (table.layers, table.columns)
        self._sums = torch.empty(self._count, dtype=torch.float64, device=device)
        self._largest = torch.empty(self._count, dtype=torch.int64, device=device)
        self._index = self._sums.get_device()
        once = (table.records[:, layers.ONCE] > 0) & (table.records[:, layers.STEPS] != 0)
        self._counts_once, self._clips = bool(once.any()), "max_grad_norm" in table.uses
        many = (table.records[:, layers.COUNT] > TILE) | (table.records[:, layers.WIDTH] > TILE)
        self._of_parameter: dict[str, Any] = MANY if bool(many.any()) else {"tile": TILE, **LAUNCH}
        self._noted: LayerTelemetry | None = None

    def begin(self, options: OptionTable, statistic: Tensor, scale: Tensor | None) -> None:
        """See ``interface.LayerKernels.begin``."""
        self._begin(options, statistic, scale)

    def _begin(
        self,
        options: OptionTable,
        statistic: Tensor,
        scale: Tensor | None = None,
        buffer: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> None:
        with torch.cuda.device(self._index):  # nothing where it is -1, the CPU's
            begin[(self._count,)](
                self._parameters, options.table, statistic, self._sums, self._largest, self._share, scale,
                buffer, slots, *self._sizes, numbers=layers.SUMS if self._table.sums else 0,
                scaled=scale is not None, reduced=buffer is not None, **self._of_parameter,
            )  # fmt: skip

    def complete(
        self,
        options: OptionTable,
        statistic: Tensor,
        veto: Tensor | None,
        packing: Packing | None,
        noted: LayerTelemetry,
        skipped: Tensor,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """See ``interface.LayerKernels.complete``."""
        self._noted, buffer, sum_of = noted, None, None
        sums, length = 0, 0
        votes: tuple[Tensor | None, ...] = (None, None, None, None)
        voting, vote_count, alike_count, ranks = 0, 0, 0, 0
        if packing is not None:
            buffer = self._packed(packing, statistic, veto)
            sum_of, sums, length, veto = packing.sum_of, packing.sums, packing.length, None
            votes = (packing.expected, packing.uneven, packing.noted_uneven, packing.alike)
            voting, vote_count = len(packing.uneven), len(packing.vote)
            alike_count, ranks = len(packing.alike), packing.ranks
            self._begin(options, statistic, None, buffer, packing.slots)
        total = torch.empty((), dtype=torch.float64, device=self._device)
        finite = torch.empty((), dtype=torch.bool, device=self._device)
        with torch.cuda.device(self._index):
            verdict[(1,)](
                self._parameters, options.table, statistic, self._sums, self._largest, sum_of, buffer, veto,
                total, finite, skipped, noted.bad_at, *votes, step, sum(self._sizes), length, self._count,
                voting, alike_count, ranks, twice=vote_count > voting, shared=ranks > 0,
                counted=self._counts_once, scattered=sums, vetoed=veto is not None, clips=self._clips,
                reduced=buffer is not None, tile=TILE, **LAUNCH,
            )  # fmt: skip
        return finite, total

    def _packed(self, packing: Packing, statistic: Tensor, veto: Tensor | None) -> Tensor:
        """The buffer of the collective, complete."""
        length = packing.length
        buffer = torch.empty(packing.numbers, dtype=torch.float64, device=self._device)
        with torch.cuda.device(self._index):
            pack[(triton.cdiv(length, TILE) + 1,)](
                packing.sources, statistic, buffer, self._sums, self._largest, packing.sum_of, veto,
                packing.vote, length, self._count, len(packing.vote), shared=packing.ranks > 0,
                scattered=packing.sums, vetoed=veto is not None, tile=TILE, **LAUNCH,
            )  # fmt: skip
        return packing.all_reduce(buffer)

    def advance(self, given: AdvanceInputs) -> Coefficients:
        """See ``interface.LayerKernels.advance``."""
        made = empty_coefficients(self._table, given.options)
        if self._counts_once and self._noted is None:  # else it is done already
            with torch.cuda.device(self._index):
                count[(1,)](
                    self._parameters, given.options.table, given.statistic, given.total, given.finite,
                    sum(self._sizes), self._count, clips=self._clips, verdicts=given.finite.ndim > 0,
                    tile=TILE, **LAUNCH,
                )  # fmt: skip
        if "clip_threshold" in self._table.uses:
            self._advance(given, made, averages=True, concludes=False)
            mean = torch.empty(self._count, dtype=torch.float64, device=self._device)
            with torch.cuda.device(self._index):
                mean_square[(self._count,)](
                    self._parameters, given.options.table, given.statistic, self._share, made.active,
                    given.total, mean, clips=self._clips, **self._of_parameter,
                )  # fmt: skip
            self._advance(given, made, given.share(mean), averages=False, concludes=True)
        else:
            self._advance(given, made, averages=True, concludes=True)
        self._noted = None
        return made

    def _advance(
        self,
        given: AdvanceInputs,
        made: Coefficients,
        mean: Tensor | None = None,
        *,
        averages: bool,
        concludes: bool,
    ) -> None:
        """Launch the kernel ``advance``, which writes ``made``; ``mean``: see its ``mean_square``."""
        norms, bad = (None, None) if self._noted is None else (self._noted.statistic, self._noted.bad)
        with torch.cuda.device(self._index):
            advance[(len(self._stretches),)](
                self._stretches, self._parameters, given.options.table, given.statistic, given.finite,
                given.total, given.scale, mean, norms, bad, made.each, made.row_root, made.column_root,
                made.active, made.key, *self._sizes, self._count, averages=averages, concludes=concludes,
                verdicts=given.finite.ndim > 0, clips=self._clips, scaled=given.scale is not None,
                clipped=mean is not None, relative="scale_parameter" in self._table.uses, tile=TILE, **LAUNCH,
            )  # fmt: skip
