"""Which parameters are matrices of hidden layers, that ``preset="muon"`` moves along orthogonal directions.

Embeddings, positions, heads and vectors are not. A model's modules say which is which; names alone say it of
most models, and where they do not, that is an error: wrong is worse than refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from novoscale.sharding.layers import Parameter, layer_matrix
from novoscale.state.momentum import sharded_dims

# Parts of a parameter's name, between its dots, that say what it is.
EMBEDDINGS = ("wte", "wpe", "wpt", "shared", "cls_token", "class_token", "pos_enc", "positional_encoding")
HEADS = ("lm_head", "head", "heads", "classifier", "score", "qa_outputs", "unembed", "embed_out", "proj_out")
FIRST = ("output", "fc", "out")  # heads if they come first: in a layer they are hidden

ADVICE = (
    'NovoGrad(novoscale.param_groups(model, preset="muon"), ...), which reads the model\'s modules, or give '
    "param groups with orthogonalize=True (matrices of hidden layers) and orthogonalize=False (all else)"
)

INT4 = (
    'momentum_dtype="int4" with orthogonal directions, which weigh rounding noise as much as the rest: int8 '
    "ends nearer to float32 (docs/muon.md)"
)
CAPTURED = (
    "a CUDA graph cannot capture a step with orthogonalize=True: its directions lie in memory that is freed "
    "after each step. Capture the forward and backward pass, and call step() outside of the graph"
)


class Role(NamedTuple):
    """What a parameter is.

    Attributes:
        hidden: whether it is made of matrices of hidden layers.
        why: in a few words.
        matrices: how many, where they are stacked along its first dimension.
    """

    hidden: bool
    why: str
    matrices: int = 1


def shape_of(p: Tensor) -> Any:
    """The shape of a parameter, as it was before DeepSpeed's ``zero.Init``."""
    return getattr(p, "ds_shape", p.shape)


def of_model(model: nn.Module, exclude: Sequence[str] | None) -> dict[int, Role]:
    """What each parameter of a model is, by its id.

    Args:
        model: before or after it is wrapped.
        exclude: patterns (``fnmatch``) of names of parameters that are not to be orthogonalised; None: there
            are none, and a model in which neither an embedding nor a head is found is refused.

    Raises:
        ValueError: such a model, or a pattern that no name matches.
    """
    embeddings = _embeddings(model)
    outputs = _outputs(model)
    inside = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    found: dict[int, Role] = {}
    names = dict(model.named_parameters())
    for wanted in exclude or ():
        if not any(fnmatchcase(name, wanted) for name in names):
            raise ValueError(f"exclude: no parameter of the model has a name like {wanted!r}")
    for name, p in names.items():
        pattern = next((x for x in exclude or () if fnmatchcase(name, x)), None)
        if id(p) in embeddings:
            role = Role(False, "embedding")
        elif id(p) in outputs:
            role = Role(False, "head")
        elif _is_norm(inside[id(p)]):
            role = Role(False, "vector")
        elif pattern is not None:
            role = Role(False, f"excluded by {pattern!r}")
        else:
            role = by_name(name, shape_of(p)) or _in_module(inside[id(p)], shape_of(p))
        found[id(p)] = role
    if exclude is None and _has_no_edge(found):
        raise ValueError(
            'param_groups: preset="muon" is for the matrices of hidden layers, and neither an embedding nor '
            "a head was found in the model. Name them, exclude=['last.*'], or say that there are none, "
            "exclude=[]"
        )
    return found


def of_names(named: Iterable[tuple[str, Tensor]], where: str) -> dict[int, Role]:
    """What each parameter is, by its id, as names say it.

    Raises:
        ValueError: a parameter may be a stack of matrices, or a convolution.
    """
    found = {}
    for name, p in named:
        shape = shape_of(p)
        role = by_name(name, shape)
        if role is None and len(shape) == 3:
            raise ValueError(
                f'{where}: preset="muon" cannot know whether {name}, of shape {tuple(shape)}, is a stack of '
                f"matrices or a convolution: use {ADVICE}"
            )
        found[id(p)] = role or Role(True, "matrix")
    return found


def _has_no_edge(roles: Mapping[int, Role]) -> bool:
    """Whether there are hidden matrices, and neither an embedding nor a head."""
    found = roles.values()
    return any(r.hidden for r in found) and not any(r.why in ("embedding", "head") for r in found)


def by_name(name: str, shape: Sequence[int]) -> Role | None:
    """What a parameter is, if its shape or its name says that it is no matrix of a hidden layer."""
    if len(shape) < 2 or math.prod(shape) in (0, max(shape)):
        return Role(False, "vector")
    if len(shape) == 3 and shape[0] == 1:  # of a convolution too: its only output
        return Role(False, "tokens")
    parts = name.lower().removeprefix("module.").removeprefix("_orig_mod.").split(".")
    if any("bias" in part for part in parts[-2:]):  # of positions, or of stacked layers
        return Role(False, "bias")
    if any(part in EMBEDDINGS or ("embed" in part and part != "embed_out") for part in parts):
        return Role(False, "embedding")
    if any(part in HEADS for part in parts) or (parts[0] in FIRST and len(parts) <= 2):
        return Role(False, "head")
    return None


def _in_module(module: nn.Module, shape: Sequence[int]) -> Role:
    """What a parameter is that is neither of an embedding nor of a head, by the module that has it."""
    if len(shape) == 3 and not isinstance(module, nn.modules.conv._ConvNd):
        return Role(True, f"{shape[0]} matrices", shape[0])
    return Role(True, "matrix")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _embeddings(model: nn.Module) -> set[int]:
    """The parameters of the modules that are embeddings; a head that shares one is the same parameter."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {
        id(p)
        for module in model.modules()
        if isinstance(module, kinds) or "embedding" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }


def _outputs(model: nn.Module) -> set[int]:
    """The parameters of heads: what transformers' models say, and a last layer as wide as a vocabulary."""
    found = set()
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        try:
            head = get() if callable(get) else None
        except (AttributeError, NotImplementedError, TypeError):
            head = None
        if isinstance(head, nn.Module):
            found |= {id(p) for p in head.parameters()}
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if embeddings and linear:
        vocabulary = max(m.num_embeddings for m in embeddings)
        last = linear[-1]
        if last.out_features == vocabulary:
            found |= {id(p) for p in last.parameters()}
    return found


# ---- param groups ----------------------------------------------------------------------------------------


def is_open(group: Mapping[str, Any], preset: str) -> bool:
    """Whether it is to be found out which parameters of a param group are hidden; ``preset``: the default."""
    return (group.get("preset") or preset) == "muon" and group.get("orthogonalize") is None


def split(params: list[Any], preset: str, orthogonalize: bool | None) -> list[Any]:
    """Split the param groups with ``preset="muon"`` into those of hidden matrices, and of all else.

    Args:
        params: what NovoGrad was given: parameters, named parameters or param groups.
        preset: that NovoGrad was given.
        orthogonalize: that NovoGrad was given.

    Raises:
        ValueError: names do not say which is which.
    """
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    opened = {i: g for i, g in enumerate(groups) if isinstance(g, dict) and is_open(g, preset)}
    if not opened or not params:
        return params
    if orthogonalize is not None:
        return [{**g, "orthogonalize": orthogonalize} if i in opened else g for i, g in enumerate(groups)]
    entries = {index: _named(group, f"param group {index}") for index, group in opened.items()}
    roles = of_names([entry for own in entries.values() for entry in own], "NovoGrad")
    if _has_no_edge(roles):
        raise ValueError(
            'NovoGrad: preset="muon" is for the matrices of hidden layers, and no parameter has the name of '
            f"an embedding or of a head: use {ADVICE}"
        )
    made: list[Any] = []
    for index, group in enumerate(groups):
        made += _split(group, entries[index], roles) if index in opened else [group]
    return made


def _named(group: Mapping[str, Any], where: str) -> list[tuple[str, Tensor]]:
    """The parameters of a param group with their names; vectors need none.

    Raises:
        ValueError: a matrix has no name.
    """
    entries = group["params"]
    entries = [entries] if isinstance(entries, Tensor) else list(entries)
    names = group.get("param_names")
    if names is not None and len(names) == len(entries):
        entries = list(zip(names, entries, strict=True))
    unnamed = [entry for entry in entries if isinstance(entry, Tensor)]
    if any(len(shape_of(p)) > 1 for p in unnamed):
        raise ValueError(
            f'{where}: preset="muon" is for the matrices of hidden layers, and parameters without names do '
            f"not say which these are: give NovoGrad model.named_parameters(), or use {ADVICE}"
        )
    return [] if unnamed else entries


def _split(
    group: Mapping[str, Any], entries: Sequence[tuple[str, Tensor]], roles: Mapping[int, Role]
) -> list[dict[str, Any]]:
    """A param group as one of hidden matrices and one of all else; or as one of them."""
    rest = {key: value for key, value in group.items() if key != "param_names"}
    made = []
    for is_hidden in (True, False):
        own = [(name, p) for name, p in entries if roles[id(p)].hidden == is_hidden]
        if own:
            made.append({**rest, "params": own, "orthogonalize": is_hidden})
    return made or [{**group, "orthogonalize": False}]


def decide(group: dict[str, Any], where: str) -> None:
    """Say of a param group that is added later whether its parameters are hidden matrices; in place.

    Raises:
        ValueError: names do not say it, or some are and some are not.
    """
    entries = _named(group, where)
    parts = _split(group, entries, of_names(entries, where))
    if len(parts) > 1:
        raise ValueError(
            f'{where}: preset="muon" has hidden matrices and other parameters in groups of their own: add '
            "them as two, one with orthogonalize=True and one with orthogonalize=False"
        )
    group["orthogonalize"] = parts[0]["orthogonalize"]


def check_matrices(name: str, p: Tensor, parameter: Parameter) -> None:
    """Raise ValueError for a parameter that cannot be orthogonalised: no matrix, or not whole on this rank.

    Args:
        name: of the parameter.
        p: the parameter.
        parameter: the same, with its layers.
    """
    rows, columns = layer_matrix(parameter)
    if len(p.shape) < 2 or min(rows, columns) < 2:
        raise ValueError(
            f"{name} has the shape {tuple(p.shape)}: orthogonalize=True is for matrices, and its layers are "
            f"{rows} x {columns}. Put it into a param group with orthogonalize=False"
        )
    ranks = math.prod(n for n, _ in sharded_dims(p)) if isinstance(p, DTensor) else 1
    if ranks > 1:
        raise ValueError(sharded_matrix(name, f"it is sharded over {ranks} ranks"))


def sharded_matrix(name: str, why: str) -> str:
    """What to say of a matrix that does not lie whole on the rank that steps it."""
    return (
        f"{name}: orthogonalize=True needs the whole matrix on the rank that steps it, and {why}. Use "
        'preset="adamw", or DistributedDataParallel'
    )
