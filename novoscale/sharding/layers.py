"""What a layer is: the parameters of a model, and into how many layers each is divided.

A *layer* is what shares one second moment: a parameter, or one of several slices of equal size along its
first dimension. A *factored* parameter is a matrix that has a second moment for each row, which are its
layers, and for each column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


class LayoutError(ValueError):
    """The elements of a tensor cannot be assigned to layers."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A full parameter, whatever a rank holds of it.

    Attributes:
        name: for messages.
        numel: its number of elements, on all ranks.
        layers: of how many layers of equal size it consists, one after another.
        number: tells it from the other parameters of the model, the same however they are sharded.
        factored: whether its columns have second moments too.
        counts_once: whether it has one count of steps, and not one for each layer.
        row_shares: over how many ranks of a wrapper's own tensor parallelism each layer is sharded, beside
            what ``numel`` says.
        column_shares: the same of each column.
        shape: of the full parameter, if it is known.
    """

    name: str
    numel: int
    layers: int = 1
    number: int = 0
    factored: bool = False
    counts_once: bool = False
    row_shares: int = 1
    column_shares: int = 1
    shape: tuple[int, ...] = ()

    @property
    def layer_numel(self) -> int:
        """Elements of each of its layers."""
        return self.numel // self.layers

    @property
    def columns(self) -> int:
        """How many columns have second moments."""
        return self.layer_numel if self.factored else 0

    def layer_name(self, layer: int) -> str:
        """The name of one of its layers."""
        return self.name if self.layers == 1 else f"{self.name}[{layer}]"


def matrix_dimensions(shape: Sequence[int]) -> int:
    """Of how many dimensions the rows of a factored parameter are made; the rest makes the columns.

    The split with the fewest rows and columns together: the smallest state.
    """
    return min(range(1, len(shape)), key=lambda k: math.prod(shape[:k]) + math.prod(shape[k:]))


def layer_matrix(parameter: Parameter) -> tuple[int, int]:
    """The rows and columns of a layer as a matrix: its first dimension by all others.

    A layer is a part of the parameter along its first dimension. One that is a single index of it has the
    parameter's other dimensions: an expert of ``[experts, rows, columns]`` is ``[rows, columns]``.
    """
    first, *others = parameter.shape or (1,)
    rows = first // parameter.layers
    if rows == 1 and len(others) > 1:
        rows = others[0]
    return rows, parameter.layer_numel // max(rows, 1)


def counts_once(granularity: str | int) -> bool:
    """Whether a parameter has one count of steps, and not one for each layer."""
    return granularity in ("element", "factored")


def describe(name: str, shape: Sequence[int], granularity: str | int, number: int = 0) -> Parameter:
    """A parameter with its layers.

    Args:
        name: the parameter's.
        shape: of the full parameter.
        granularity: what a layer is, see ``NovoGrad``.
        number: see ``Parameter``.

    Raises:
        LayoutError: the number of layers does not divide the first dimension, or a layer for each element of
            a parameter that is no vector.
    """
    numel = math.prod(shape)
    factored = granularity == "factored" and len(shape) > 1 and numel > 0
    layers = _layers(name, shape, granularity) if numel else 1
    return Parameter(name, numel, layers, number, factored, counts_once(granularity), shape=tuple(shape))


def _layers(name: str, shape: Sequence[int], granularity: str | int) -> int:
    """Into how many layers a parameter is divided along its leading dimensions."""
    is_vector = len(shape) < 2
    if granularity == "tensor" or (granularity == "row" and is_vector):
        return 1
    if granularity == "row":
        return shape[0]
    if counts_once(granularity) and is_vector:
        return math.prod(shape)
    if granularity == "factored":
        return math.prod(shape[: matrix_dimensions(shape)])
    if granularity == "element":
        elements, split = math.prod(shape), matrix_dimensions(shape)
        factors = math.prod(shape[:split]) + math.prod(shape[split:])
        raise LayoutError(
            f'{name} has the shape {tuple(shape)}: granularity="element" is for vectors, and would keep '
            f"{elements:,} second moments here, {4 * elements:,} bytes, as many as Adam. Use "
            f'granularity="factored", which keeps {factors:,} and has one for each element of vectors'
        )
    count = int(granularity)
    if not shape or shape[0] % count:
        raise LayoutError(
            f"{name}: granularity={count} divides a parameter into {count} layers of equal size along its "
            f"first dimension, which its shape {tuple(shape)} does not allow. Put it into a param group of "
            "its own"
        )
    return count
