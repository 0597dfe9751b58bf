"""Which options NovoGrad accepts, and what it says of the others."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from novoscale.optimizer import presets
from novoscale.optimizer.tensor_checks import check_has_fused
from novoscale.state.formats import FORMATS

FLAGS = (
    "bias_correction",
    "grad_averaging",
    "init_zero",
    "reg_inside_moment",
    "maximize",
    "stochastic_rounding",
    "allow_lossy_load",
    "nesterov",
    "scale_parameter",
    "orthogonalize",
    "row_normalize",
)
NUMBERS = ("lr", "eps", "weight_decay", "max_grad_norm", "clip_threshold")
GRANULARITIES = ("tensor", "row", "factored", "element")

# Options that other NovoGrads have and this one has not, and what to do instead.
_ELSEWHERE = {
    "amsgrad": "this NovoGrad has no AMSGrad variant (Apex refuses it too): leave the option out",
    "set_grad_none": "use optimizer.zero_grad(set_to_none=...)",
    "luc": "NeMo's layer-wise update clipping is not implemented: leave the option out",
    "clip_grad": "use max_grad_norm",
    "relative_step": "set lr, with scale_parameter=True if it is to be relative to the weights",
    "momentum": "use betas=(momentum, ...)",
    "block_size": "the blocks of int8 and int4 momenta have 128 elements: leave the option out",
    "bf16_stochastic_round": "use stochastic_rounding",
    "learning_rate": "use lr",
    "epsilon": "use eps",
}

# Keys of other optimizers' param groups, and words of people's own, that look like an option misspelt.
_NOT_MISSPELT = ("etas", "grad_norm", "normalized", "used")
# How much a key of a param group is like an option that it is taken for, from 0 to 1.
_ALIKE = 0.8

# Options of torch's optimizers that need not be taken out of ported code: see check_ported.
_PORTED = ("capturable", "differentiable")

# What to do without the norm of all gradients.
NOT_CLIPPED = (
    "the gradient of the whole model is never there. Leave the clipping out and give NovoGrad "
    "clip_threshold=1.0, which clips the update of each parameter"
)


def refuse_unknown_options(unknown: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise TypeError for an option that NovoGrad does not have, with the nearest that it has."""
    check_ported(unknown, "NovoGrad")
    names = list(known)
    for name in [name for name in unknown if name not in _PORTED]:
        near = difflib.get_close_matches(name, names, n=1)
        advice = _ELSEWHERE.get(name) or (
            f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(names)}"
        )
        raise TypeError(f"NovoGrad has no option {name!r}: {advice}")


def refuse_misspelt_keys(group: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise TypeError for a key of a param group that is an option misspelt, or one of other optimizers.

    Any other key may be there: schedulers, frameworks and people keep things of their own in param groups,
    many under a name that has an option's full name in it (``initial_lr``, ``lr_scale``, ``max_lr``).
    """
    names = list(known)
    for key in [key for key in group if isinstance(key, str) and key not in names]:
        if group[key] is None:
            continue
        if key in _ELSEWHERE and group[key] is not False:
            raise TypeError(f"{where}: NovoGrad has no option {key!r}: {_ELSEWHERE[key]}")
        word = key.lower().replace("-", "_").strip("_")
        beside = any(word != name and f"_{name}_" in f"_{word}_" for name in names)
        near = difflib.get_close_matches(word, names, n=1, cutoff=_ALIKE)
        if near and not beside and key not in (*_NOT_MISSPELT, *_ELSEWHERE):
            raise TypeError(
                f"{where}: NovoGrad has no option {key!r}: did you mean {near[0]!r}? A key of your "
                "own needs a name that is less like an option's"
            )


def check_ported(options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for ``differentiable=True``. Any ``capturable`` is right: a step can be captured."""
    if options.get("differentiable"):
        raise ValueError(
            f"{where}: differentiable=True: NovoGrad changes weights in place, and autograd does not see it. "
            "Leave the option out"
        )


def plain_numbers(options: dict[str, Any]) -> None:
    """Make floats of the options of a param group that are other numbers, such as NumPy's; in place.

    A tensor is read, but for ``lr``, which stays one.
    """
    for name in NUMBERS:
        value = options[name]
        if type(value) is not float and not (name == "lr" and isinstance(value, Tensor)):
            options[name] = _plain(value)
    if isinstance(options["betas"], (tuple, list)):
        options["betas"] = tuple(map(_plain, options["betas"]))


def _plain(value: Any) -> Any:
    """A number as a float; anything else as it is."""
    if value is None or type(value) in (float, bool) or not hasattr(value, "__float__"):
        return value
    try:
        return float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):  # several numbers, or none
        return value


def check_options(options: dict[str, Any], where: str) -> None:
    """Check the options of a param group; make numbers floats and ``momentum_dtype`` a name.

    Args:
        options: the group (or the defaults); other keys are left alone.
        where: said in the error, such as "param group 0".

    Raises:
        ValueError: a value out of range.
        TypeError: a value of the wrong kind.
    """
    if "preset" not in options:
        raise ValueError(f"{where} has not NovoGrad's options: add it with optimizer.add_param_group(...)")
    presets.check(options["preset"], where)
    check_ported(options, where)
    plain_numbers(options)
    _check_lr(options["lr"], where)
    _check_betas(options["betas"], where)
    for name in ("eps", "weight_decay"):
        _number(name, options[name], where)
    for name in FLAGS:
        if not isinstance(options[name], bool):
            raise TypeError(f"{where}: {name} must be True or False, got {options[name]!r}")
    if isinstance(options["norm_type"], bool) or options["norm_type"] not in (0, 2):
        raise ValueError(
            f"{where}: norm_type must be 2 (Euclidean norm) or 0 (largest magnitude), "
            f"got {options['norm_type']!r}"
        )
    if options["max_grad_norm"] is not None:
        _number("max_grad_norm", options["max_grad_norm"], where)
        if options["max_grad_norm"] and options["norm_type"] == 0:
            raise ValueError(
                f"{where}: max_grad_norm needs norm_type=2: with the largest magnitudes of norm_type=0 the "
                "norm of the whole gradient is not known. Set max_grad_norm=None"
            )

    options["momentum_dtype"] = _momentum_dtype(options["momentum_dtype"], where)
    _check_granularity(options["granularity"], where)
    if options["normalize"] not in ("norm", "rms"):
        raise ValueError(f'{where}: normalize must be "norm" or "rms", got {options["normalize"]!r}')
    if options["clip_threshold"] is not None:
        _number("clip_threshold", options["clip_threshold"], where)
        if options["clip_threshold"] == 0:
            raise ValueError(f"{where}: clip_threshold must be above 0; None does not clip the update")
    _check_together(options, where)
    if options["orthogonalize"]:
        _check_orthogonal(options, where)
    seed = options["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"{where}: seed must be an integer of at least 0 and below 2**32, got {seed!r}")


def _check_together(options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for options that contradict each other."""

    def said(option: str) -> str:
        value = options[option]
        return f"{option}={json.dumps(value)}{presets.origin(options, option)}"

    factored = options["granularity"] == "factored"
    if factored and options["normalize"] != "rms":
        raise ValueError(
            f"{where}: {said('granularity')} divides by the root of a mean square and needs "
            f'normalize="rms", not {said("normalize")}'
        )
    wanted = [
        option
        for option, found in (
            ("granularity", factored),
            ("normalize", options["normalize"] == "rms"),
            ("clip_threshold", options["clip_threshold"] is not None),
            ("scale_parameter", options["scale_parameter"]),
        )
        if found
    ]
    if wanted and options["norm_type"] == 0:
        raise ValueError(
            f"{where}: {said(wanted[0])} is made of sums of squares and needs norm_type=2, not the largest "
            "magnitudes of norm_type=0"
        )
    of_update = [o for o in wanted if o in ("clip_threshold", "scale_parameter")]
    if of_update and not options["reg_inside_moment"]:
        raise ValueError(
            f"{where}: {said(of_update[0])} scales the normalised gradient before it enters the moment; "
            "with reg_inside_moment=False the plain gradient enters it. Set reg_inside_moment=True"
        )


def _check_orthogonal(options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for options that are not for matrices that move along an orthogonal direction."""
    steps = options["ns_steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < 100:
        raise ValueError(f"{where}: ns_steps must be an integer of at least 1 and below 100, got {steps!r}")
    refused = {
        "granularity": (
            options["granularity"] in ("row", "factored", "element"),
            'a layer is one matrix there: use granularity="tensor", or the number of equal matrices that a '
            "parameter consists of",
        ),
        "norm_type": (options["norm_type"] == 0, "use norm_type=2"),
        "reg_inside_moment": (
            not options["reg_inside_moment"],
            "the normalised gradient enters the moment, and the decay stays outside of it: leave "
            "reg_inside_moment out",
        ),
        "clip_threshold": (
            options["clip_threshold"] is not None,
            "the direction has one size whatever the update is clipped to: leave clip_threshold out",
        ),
        "scale_parameter": (
            options["scale_parameter"],
            "the direction has one size whatever multiplies the gradient: leave scale_parameter out",
        ),
    }
    for option, (found, advice) in refused.items():
        if found:
            raise ValueError(
                f"{where}: orthogonalize=True{presets.origin(options, 'orthogonalize')} cannot be used with "
                f"{option}={options[option]!r}{presets.origin(options, option)}: {advice}"
            )


def _momentum_dtype(value: Any, where: str) -> str:
    name = str(value).removeprefix("torch.")
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        advice = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"{where}: momentum_dtype must be one of {', '.join(FORMATS)}, got {value!r}{advice}"
        )
    return name


def _check_granularity(value: Any, where: str) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value not in GRANULARITIES and not is_count:
        near = difflib.get_close_matches(str(value), GRANULARITIES, n=1)
        raise ValueError(
            f'{where}: granularity must be "tensor", "row" or the number of layers of equal size into which '
            f'a parameter is sharded along its first dimension, or "factored" or "element", got {value!r}'
            f"{f' (did you mean {near[0]!r}?)' if near else ''}"
        )


def _number(name: str, value: Any, where: str, below: float = float("inf")) -> None:
    if not isinstance(value, float):
        raise TypeError(f"{where}: {name} must be a number, got {value!r} ({type(value).__name__})")
    if not 0 <= value < below:
        bound = "a finite number of at least 0" if below == float("inf") else f"at least 0 and below {below}"
        raise ValueError(f"{where}: {name} must be {bound}, got {value}")


def _check_lr(lr: Any, where: str) -> None:
    if not isinstance(lr, Tensor):
        _number("lr", lr, where)
    elif lr.numel() != 1:
        raise ValueError(f"{where}: Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    elif not lr.is_floating_point() and lr.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where}: Tensor lr must hold a real number, got {lr.dtype}")
    elif lr.device.type == "cpu":  # to read another would wait for its device
        _number("lr", float(lr.item()), where)


def _check_betas(betas: Any, where: str) -> None:
    if not isinstance(betas, tuple) or len(betas) != 2:
        raise TypeError(f"{where}: betas must be two numbers (beta1, beta2), got {betas!r}")
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        _number(name, beta, where, below=1)


def one_max_grad_norm(groups: Sequence[Mapping[str, Any]]) -> float | None:
    """The ``max_grad_norm`` of all param groups.

    Raises:
        ValueError: if they differ.
    """
    limits = [group["max_grad_norm"] or None for group in groups]
    if any(limit != limits[0] for limit in limits):
        raise ValueError(
            "max_grad_norm clips the gradient of the whole model: it must be the same in every param "
            f"group, got {limits}"
        )
    return limits[0] if limits else None


def wrapped_and_released(wrapper: str) -> str:
    """What to say of ``release_gradients`` under a wrapper that steps the parameters."""
    return (
        f"release_gradients cannot be used with {wrapper}, which reduces gradients and steps by itself. Use "
        "ZeRO stage 2 or 3, which free gradients in the backward pass, and leave release_gradients out"
    )


def clipped_and_released(max_grad_norm: float) -> str:
    """What to say of ``max_grad_norm`` where gradients are released."""
    return f"max_grad_norm={max_grad_norm} cannot be used with release_gradients: {NOT_CLIPPED}"


def check_fused(group: Mapping[str, Any], where: str) -> None:
    """Check ``foreach`` and ``fused`` of a param group against its parameters, as torch does.

    Raises:
        RuntimeError: both, or ``fused=True`` where there is no fused kernel for a parameter.
        TypeError: neither True, False nor None.
    """
    for name in ("foreach", "fused"):
        if group[name] not in (True, False, None):
            raise TypeError(f"{where}: {name} must be True, False or None, got {group[name]!r}")
    if group["foreach"] and group["fused"]:
        raise RuntimeError(f"{where}: `fused` and `foreach` cannot be `True` together.")
    for p in group["params"] if group["fused"] else ():
        if not p.is_meta:  # the step sees where it has come to lie
            check_has_fused(p, where)
