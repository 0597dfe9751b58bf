"""What the pass over the layers is given: a table of parameters, and one of their param groups' options.

It comes between the two passes over the elements, and updates the second moments of the layers of all param
groups at once: see ``interface.LayerKernels``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from novoscale.kernels.shards import Coefficients
from novoscale.kernels.uploads import Upload
from novoscale.sharding.indices import repeated

# The columns of a table of options, float64: one row for each param group of a step. They may change from
# step to step, and no other table depends on them.
LR = 0
BETA1 = 1
BETA2 = 2
BETA3 = 3  # weight of the new term of the first moment: 1, or 1 - beta1
WEIGHT_DECAY = 4
EPS = 5
CLIP_THRESHOLD = 6  # 0: none
SIGN = 7  # -1 to maximize
NORM_TYPE = 8
BIAS_CORRECTION = 9  # from here on: whether, 0 or 1
INIT_ZERO = 10
RMS = 11  # divided by the mean of the squares, and not by their sum
NESTEROV = 12
INSIDE = 13  # reg_inside_moment
RELATIVE = 14  # scale_parameter
SEED = 15
LIMIT = 16  # max_grad_norm, the same in all; 0: none
OPTIONS = 17

# Of them, in this order, those of ``shards.Coefficients.options``.
UPDATE = [BETA1, BETA3, WEIGHT_DECAY, EPS]

# The columns of a table of parameters, int64, in the order of the vector of layers; a rank's part of each.
GROUP = 0  # its row of the table of options
FIRST = 1  # of all layers, its first one
COUNT = 2  # how many layers it has on this rank
FIRST_COLUMN = 3  # of all columns, its first one
WIDTH = 4  # how many columns, if it is factored; else 0
NUMEL = 5  # elements of a layer, on all ranks
LAYERS = 6  # how many layers there are on all ranks
NUMBER = 7  # see ``layout.Parameter``
ONCE = 8  # whether it has one count of steps
ROUNDS = 9  # whether anything of it is rounded stochastically
SCATTERED = 10  # whether ranks have different layers of it
V = 11  # address of its layers' second moments; 0, as for the next two, where there is no such tensor
OF_COLUMNS = 12  # address of its columns' second moments
STEPS = 13  # address of its counts of steps
RECORD = 14

# The numbers of each parameter that the ranks add up: see ``interface.LayerKernels.begin``.
FRESH, KEPT, WEIGHTS = range(3)
SUMS = 3

# The least root mean square of a parameter that a relative step assumes (Adafactor's epsilon_2).
LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class LayerTable:
    """The layers of a step, of all param groups.

    Attributes:
        records: int64 ``[parameters, 14]`` on the CPU: the columns above.
        layers: how many layers there are.
        columns: how many columns of factored parameters.
        share: float64 ``[layers]``: 1 if this rank is the one that counts a layer when they are, else 0. None
            where nothing is added up.
        uses: the options in use in any param group, of ``NEEDED``.
        dtype: of what the update is given: float32, or float64 where a tensor is.
    """

    records: Tensor
    layers: int
    columns: int
    share: Tensor | None
    uses: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32

    @property
    def sums(self) -> bool:
        """Whether numbers of each parameter are added up over the ranks."""
        return self.share is not None

    def stretches(self, size: int) -> Tensor:
        """Split the layers into stretches of at most ``size``, each of one parameter; then the columns.

        Returns:
            int64 ``[stretches, 4]`` on the CPU: the parameter, its layers (or columns) from..to, and whether
            they are columns.
        """
        parts = []
        for columns, counts in enumerate((self.records[:, COUNT], self.records[:, WIDTH])):
            index, nth = repeated((counts + size - 1) // size)
            start = nth * size
            stop = torch.minimum(start + size, counts[index])
            parts.append(torch.stack((index, start, stop, torch.full_like(index, columns)), dim=1))
        return torch.cat(parts)


# Options without which something need not be computed.
NEEDED = ("bias_correction", "clip_threshold", "max_grad_norm", "scale_parameter")


class OptionTable:
    """The options of the param groups of a step on the device, written only when they have changed.

    Args:
        groups: how many there are.
        device: where the table is.
        dtype: of what the update is given.
    """

    def __init__(self, groups: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._rows: list[list[float]] = []
        self._all = Upload(torch.zeros(groups, OPTIONS, dtype=torch.float64, device="cpu"), device)
        self._of_update = Upload(torch.zeros(groups, len(UPDATE), dtype=dtype, device="cpu"), device)

    @property
    def table(self) -> Tensor:
        """float64 ``[groups, 17]``: the columns above."""
        return self._all.on_device

    @property
    def limit(self) -> float:
        """What the norm of the gradients of the model is clipped to; 0: it is not clipped."""
        return self._rows[0][LIMIT]

    @property
    def of_update(self) -> Tensor:
        """The options that the update reads: see ``shards.Coefficients.options``."""
        return self._of_update.on_device

    def differs(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether :meth:`take` would write into the table."""
        return self._rows != [*map(option_row, groups)]

    def take(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Write the options of the param groups into the table, if they have changed."""
        rows = [*map(option_row, groups)]
        if rows != self._rows:
            self._rows = rows
            table = torch.tensor(rows, dtype=torch.float64, device="cpu")
            self._all.write(table)
            self._of_update.write(torch.stack([table[:, column] for column in UPDATE], dim=1))
        # Not by way of the host: it would wait for the device. Again at each replay of a CUDA graph.
        rates = {index: group["lr"] for index, group in enumerate(groups) if _on_device(group["lr"])}
        if len({id(lr) for lr in rates.values()}) == 1 and len(rates) == len(groups):
            self.table[:, LR].copy_(rates[0].reshape(1))
        else:
            for index, lr in rates.items():
                self.table[index, LR].copy_(lr.reshape(()))


def empty_coefficients(table: LayerTable, options: OptionTable) -> Coefficients:
    """Coefficients to be written into."""

    def empty(*shape: int, dtype: torch.dtype = table.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=options.table.device)

    return Coefficients(
        each=empty(table.layers, 4),
        options=options.of_update,
        active=empty(table.layers, dtype=torch.bool),
        key=empty(table.layers, dtype=torch.int32),
        row_root=empty(table.layers) if table.columns else None,
        column_root=empty(table.columns) if table.columns else None,
    )


def _on_device(lr: Tensor | float) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def option_row(group: Mapping[str, Any]) -> list[float]:
    """The options of a param group: a row of the table. An ``lr`` on a device is not read: it is 0 here."""
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    return [
        0.0 if _on_device(lr) else float(lr),
        beta1,
        beta2,
        1 - beta1 if group["grad_averaging"] else 1.0,
        group["weight_decay"],
        group["eps"],
        group["clip_threshold"] or 0.0,
        -1.0 if group["maximize"] else 1.0,
        group["norm_type"],
        group["bias_correction"],
        group["init_zero"],
        group["normalize"] == "rms",
        group["nesterov"],
        group["reg_inside_moment"],
        group["scale_parameter"],
        group["seed"],
        group["max_grad_norm"] or 0.0,
    ]
