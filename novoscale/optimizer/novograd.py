"""NovoGrad: Algorithm 1 of arXiv 1905.11286, the same however the parameters are sharded."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from novoscale.optimizer import hidden, options, presets, tensor_checks, uneven
from novoscale.optimizer.checkpointed import CheckpointedOptimizer
from novoscale.optimizer.telemetry import Telemetry
from novoscale.sharding.plan import Plan


class NovoGrad(CheckpointedOptimizer):
    r"""Stochastic gradients normalised by one second moment per layer.

    In the paper's form (``preset="paper"``), for each layer, with gradient g and weight w:

        S = sum(g**2)
        v = S if v == 0 else beta2*v + (1 - beta2)*S
        m = beta1*m + (g / (sqrt(v) + eps) + weight_decay*w)
        w = w - lr*m

    A layer whose gradient has been zero since the start (v == 0 and S == 0) is left as it is. A step
    in which any layer's gradient is not finite, on any rank, changes nothing on any rank: see
    ``skipped_steps``. Gradients are never written to, and a step does not wait for the device.

    State, per parameter tensor: ``exp_avg`` (m; as ``momentum_dtype`` says, see ``novoscale.state.formats``;
    float64 for a float64 parameter instead of float32; absent if beta1 is 0) and ``exp_avg_sq`` (v;
    float32, one element per layer that this rank holds): 4 bytes per element plus 4 per layer. A factored
    parameter has ``exp_avg_sq_row`` and ``exp_avg_sq_col`` instead, see ``second_moment.allocate``. With
    ``bias_correction``, and where anything is rounded stochastically, also ``step`` (float32, one element
    per layer, or per parameter where it is factored). They keep their dtype through ``load_state_dict``.

    The default, ``preset="adamw"``, has averages as Adam's and factored second moments; "muon" moves matrices
    along orthogonal directions. Option names are those of ``apex.optimizers.FusedNovoGrad`` and Adafactor.
    The arguments that reproduce other implementations are in ``docs/coming-from.md``. ``print`` shows the
    options of each param group and where they come from.

    Args:
        params: parameters, named parameters or param groups; float32, bfloat16, float16 or float64.
        lr: learning rate; a number or a tensor of one element. A tensor on another device than the CPU is not
            read, which would wait for the device: nothing refuses it if it is below 0 or NaN.
        betas: decay of the first moment and of the second. With beta1 = 0 no first moment is kept. None, as
            with every option that a preset has: the preset's. Tensors are read, once: to change betas later
            put others into the param group.
        eps: added to the square root of the second moment.
        weight_decay: times the weight, added to the normalised gradient.
        preset: a word for a set of options, of which each that is given wins: "adamw" (the default: learns as
            AdamW does, at its learning rates: factored second moments, AdamW's averages, Nesterov), "paper"
            (Algorithm 1) or "muon" (one second moment for each layer, and orthogonal directions for the
            matrices of hidden layers, which are found by ``param_groups`` or by the names of named
            parameters; their learning rate is ``presets.HIDDEN_LR`` times ``lr``, unless their group has
            its own). A param group may have its own. See ``novoscale.optimizer.presets``.
        bias_correction: divide m by ``1 - beta1**t`` and sqrt(v) by ``sqrt(1 - beta2**t)``, t counting the
            layer's own steps (as Apex; the paper has none).
        grad_averaging: weight the new term of the first moment with 1 - beta1.
        norm_type: 2, or 0: v then averages the largest magnitude instead of the sum of squares.
        init_zero: start v at 0 instead of at the first S.
        reg_inside_moment: True (the paper): m accumulates the normalised gradient and the decay.
            False (Apex's default): m accumulates the plain gradient; it is normalised, and the
            decay added, when the weight is changed.
        max_grad_norm: clip the gradient of all param groups together to this Euclidean norm, as
            ``torch.nn.utils.clip_grad_norm_`` would, without a pass of its own and without writing
            to the gradients. None or 0: no clipping.
        maximize: ascend.
        momentum_dtype: how the first moment is stored: "float32"; "bfloat16"; "int8" and "int4" in blocks of
            128 elements with one bfloat16 scale each. About 4, 2, 1.02 and 0.52 bytes per element. All but
            float32 are rounded stochastically. Parameters of fewer than 4096 elements (of all ranks) keep
            float32 where others are in blocks. A torch dtype will do.
        granularity: what a layer is: "tensor" (the paper): a parameter; "row": an index of the first
            dimension of a parameter of two dimensions or more; a number n: one of n equal slices along the
            first dimension, such as 3 for a fused QKV weight. "factored": a parameter of two dimensions or
            more is a matrix, by the split of its dimensions with the fewest rows and columns, and the second
            moment of an element is that of its row times that of its column (Adafactor, arXiv 1804.04235); a
            vector has one for each element. "element": that, for vectors only.
        normalize: "norm" (the paper): divide the gradient by the norm of its layer; "rms": by the root mean
            square, so that a learning rate means the same for every size and AdamW's values carry over.
        nesterov: move the weight along the new term of the first moment too, as NAdam with a constant beta1
            (Dozat 2016); costs no state.
        clip_threshold: divide the normalised gradient u of a parameter by max(1, rms(u) / clip_threshold)
            (Adafactor's option). rms(u) is taken from the sums that are known: the mean of S/v over the
            layers, of factored parameters over the rows. None: no clipping.
        scale_parameter: multiply u by max(1e-3, rms(w)) of the full parameter (Adafactor's option), so that
            the learning rate is relative to the weights; the decay is not. Reads the weights once more.
        orthogonalize: move matrices along the orthogonal factor of their first moment (Muon,
            kellerjordan.github.io/posts/muon), with the root mean square of an AdamW step; the decay stays
            out of it. A matrix is a layer; of convolutions the first dimension by all others. A matrix must
            lie whole on the rank that steps it.
        ns_steps: how many steps of Newton and Schulz make a direction orthogonal.
        row_normalize: divide each row of an orthogonal direction by the root of its own running mean square,
            and scale it back to its norm (NorMuon, arXiv 2510.05491): ``direction_avg_sq`` in the state,
            float32, one for each row.
        stochastic_rounding: of the weights where they are bfloat16 (and have no float32 master: a wrapper
            that keeps one gives it to the optimizer). Else a step of less than half a bfloat16 is lost; of
            float16 weights it always is, which is said once.
        seed: of the random bits for rounding; they do not depend on how the model is sharded, nor on the
            rank. (Under ``ZeroRedundancyOptimizer`` they do, unless it is told by ``number_as``.)
        allow_lossy_load: let ``load_state_dict`` round a first moment to a ``momentum_dtype`` that cannot
            hold it, a collective where that is in blocks that are sharded; and take over the state of an
            Adam.
        foreach: True: torch's own operations (``kernels/reference``), as with ``fused=False``.
        fused: True: a fused kernel (Triton on a GPU, C++ on the CPU), or an error; False: torch's own
            operations. None: the fused kernel where there is one. All give the same bits.

    A number may be of any kind that ``float`` takes, such as NumPy's; param groups have it as a float.
    ``capturable`` and ``differentiable``, which torch's optimizers have, may stay in ported code: a step can
    always be captured in a CUDA graph (let ``lr`` be a tensor on the device there, if it changes), and
    ``differentiable=True`` is refused.

    Under ``torch.amp.GradScaler`` leave ``scaler.unscale_`` out: the step divides by the scale itself.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimised.
        RuntimeError: ``fused=True`` where there is no fused kernel. (On the device meta: at the step.)
        TypeError: an option that NovoGrad does not have, or one of the wrong kind.
    """

    # Private, not copied.
    _telemetry: Telemetry
    _veto: Tensor | None  # see veto()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        preset: str = presets.DEFAULT,
        bias_correction: bool | None = None,
        grad_averaging: bool | None = None,
        norm_type: int = 2,
        init_zero: bool | None = None,
        reg_inside_moment: bool = True,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        momentum_dtype: str | torch.dtype = "float32",
        granularity: str | int | None = None,
        normalize: str | None = None,
        nesterov: bool | None = None,
        clip_threshold: float | None = None,
        scale_parameter: bool = False,
        orthogonalize: bool | None = None,
        ns_steps: int = 5,
        row_normalize: bool = False,
        stochastic_rounding: bool = True,
        seed: int = 0,
        allow_lossy_load: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **unknown: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "preset": preset,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "norm_type": norm_type,
            "init_zero": init_zero,
            "reg_inside_moment": reg_inside_moment,
            "max_grad_norm": max_grad_norm,
            "maximize": maximize,
            "momentum_dtype": momentum_dtype,
            "granularity": granularity,
            "normalize": normalize,
            "nesterov": nesterov,
            "clip_threshold": clip_threshold,
            "scale_parameter": scale_parameter,
            "orthogonalize": orthogonalize,
            "ns_steps": ns_steps,
            "row_normalize": row_normalize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "allow_lossy_load": allow_lossy_load,
            "foreach": foreach,
            "fused": fused,
        }
        options.refuse_unknown_options(unknown, defaults)
        presets.complete(defaults, "NovoGrad")
        options.check_options(defaults, "NovoGrad")
        self._clear_caches()
        listed = tensor_checks.listed(params)
        if isinstance(listed, list):
            listed = hidden.split(listed, preset, orthogonalize)
        super().__init__(listed, defaults)
        if row_normalize and not any(group["orthogonalize"] for group in self.param_groups):
            raise ValueError(
                "NovoGrad: row_normalize=True is for the rows of orthogonal directions, and no param group "
                'has orthogonalize=True: set preset="muon", or leave it out'
            )
        if any(g["orthogonalize"] and g["momentum_dtype"] == "int4" for g in self.param_groups):
            warnings.warn(hidden.INT4, stacklevel=2)

    # ---- the step -----------------------------------------------------------------------------

    # A compiled training step breaks its graph here: addresses cannot be traced. (torch.compiler.disable does
    # the same, and imports dynamo at once, which takes seconds.)
    @_disable_dynamo
    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Algorithm 1 on every parameter that has a gradient.

        Args:
            closure: evaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a sparse or complex gradient, or a tensor that is not one of those given to
                this optimizer. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_some(self._given())
        self._telemetry.end_step(by_groups=self._wrapper is not None)
        if self._untrained:
            self._say_untrained()
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def step_some(self, tensors: Iterable[tuple[int, Sequence[Tensor]]]) -> None:
        """Step some of the tensors of ``param_groups``, if they have a gradient; ``step`` ends the step.

        Args:
            tensors: by the index of their param group. DTensors without a gradient are part of it: other
                ranks may have one.

        Raises:
            RuntimeError: see ``step``.
        """
        groups, absent = self._with_gradients(tensors)
        limit = options.one_max_grad_norm(self.param_groups)
        if limit and self._released is not None:
            raise RuntimeError(options.clipped_and_released(limit))
        if groups:
            self._note_training(groups)
            ready = self._tables_for(groups, absent)
            scale, veto = self._amp(ready.plan.device)
            statistic = ready.statistic(scale)
            finite, total = ready.complete(statistic, veto, self._telemetry)
            ready.update(ready.second_moments(statistic, finite, total, scale))
            ready.release()
            uneven.refuse(ready.plan)
        elif absent and (plan := self._plan_of_others(absent)) is not None:
            uneven.step_of_others(plan, self._amp(plan.device)[1], self._telemetry)

    # ---- mixed precision ------------------------------------------------------------------------

    def _amp(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """What ``torch.amp.GradScaler`` left here: the scale of the loss, and whether to skip the step.

        The scale is where the loss is, which need not be where the parameters are.
        """
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        veto = self._veto if found_inf is None else found_inf.reshape(()) > 0
        return None if scale is None else scale.to(device).reshape(()), veto

    # ---- param groups -----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; refuses by name what cannot be optimised.

        Raises:
            ValueError: a parameter that is not a leaf or not of a floating-point dtype that NovoGrad
                supports, or an option out of range.
            TypeError: an option of the wrong kind, or a key that is an option misspelt.
        """
        index = len(self.param_groups)
        if isinstance(param_group, dict):
            options.refuse_misspelt_keys(param_group, [*self.defaults, "params"], f"param group {index}")
            params = param_group["params"]
            tensor_checks.refuse_used_up(params, f"param group {index}")
            if not isinstance(params, (Tensor, set)):
                param_group["params"] = params = list(params)
            for position, entry in enumerate([params] if isinstance(params, Tensor) else params):
                name, p = entry if isinstance(entry, tuple) else (None, entry)
                tensor_checks.check_parameter(name or f"parameter {position} of param group {index}", p)
            if hidden.is_open(param_group, self.defaults["preset"]):
                hidden.decide(param_group, f"param group {index}")
            presets.of_group(param_group, self.defaults, f"param group {index}")
            options.check_options(param_group, f"param group {index}")
            options.one_max_grad_norm([*self.param_groups, param_group])
        super().add_param_group(param_group)
        try:
            options.check_fused(self.param_groups[-1], f"param group {index}")
            self._note_layouts(index)
            self._check_preset(index)
        except (RuntimeError, TypeError, ValueError):
            self.param_groups.pop()
            raise

    def veto(self, skip: Tensor | None) -> None:
        """Have the coming steps changed nothing, on any rank that shares a layer's process group.

        For a wrapper that steps its groups one by one and knows that a later group's gradient is not
        finite: no group may step then.

        Args:
            skip: 0-dim bool, read on the device at each step until it is replaced; None lifts it.
        """
        self._veto = skip

    def squares_of_gradients(self) -> Tensor | None:
        """The sum of the squares of the gradients that ``step_some`` has used in this step; 0-dim."""
        return self._telemetry.squares

    # ---- what a step has shown ------------------------------------------------------------------

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing because a gradient was not finite; under
        ``novoscale.release_gradients`` how many left out some parameters. Waits for the device.
        """
        return self._telemetry.skipped_steps(by_groups=self._wrapper is not None)

    def skipped_layers(self) -> list[str]:
        """Names of the layers, among those this rank holds, that had the last skipped step skipped.

        Waits for the device.
        """
        return self._telemetry.skipped_layers(self._plans())

    def layer_norms(self) -> dict[str, float]:
        """The gradient norm of each layer of which this rank holds a part, before clipping, at its last step.

        It is that of the full layer; with ``norm_type=0`` the largest magnitude. Waits for the device.
        """
        return {name: norm for plan in self._plans() for name, norm in plan.norms().items()}

    def _plans(self) -> list[Plan]:
        return [*(ready.plan for ready in self._step_tables.values()), *self._plans_of_others.values()]

    def __repr__(self) -> str:
        common = {name: parameter.default for name, parameter in _OPTIONS.items()}
        groups = (
            f"  param group {index}, {len(group['params'])} parameters\n{presets.described(group, common)}"
            for index, group in enumerate(self.param_groups)
        )
        return "NovoGrad (\n" + "\n".join(groups) + "\n)"

    def _clear_caches(self) -> None:
        super()._clear_caches()
        self._telemetry, self._veto = Telemetry(), None


_OPTIONS = inspect.signature(NovoGrad.__init__).parameters
