"""Which layers the tensors of an optimizer hold, and the tables of the sets that are stepped together."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from novoscale.kernels.uploads import capturing
from novoscale.optimizer import hidden, options, presets, step_plan, step_tables, tensor_checks
from novoscale.optimizer.layer_table import Absent, Group, Groups
from novoscale.optimizer.step_plan import AbsentLayout, Mode
from novoscale.optimizer.step_tables import StepTables, StepTensors
from novoscale.sharding.dtensors import has_dtensors, local_tensor, sharded
from novoscale.sharding.layers import LayoutError, Parameter, describe
from novoscale.sharding.layout import Layout, unsharded
from novoscale.sharding.plan import Plan
from novoscale.state import momentum, second_moment, step_counts
from novoscale.state.step_counts import counts_steps

# Of how many sets of tensors the tables are kept, beside one for each tensor: a model has many sets if each
# step gives gradients to other parts of it.
MAX_CACHED_TABLES = 256


class LayerwiseOptimizer(Optimizer):
    """An optimizer that knows which layers the tensors of its param groups hold, however they are sharded."""

    # Caches: private, not copied, rebuilt from param_groups.
    _layouts: dict[int, Layout]  # by id(tensor)
    _presets: dict[int, tuple[Group, dict[str, Any]]]  # presets.chosen(group), by index of the group
    _untrained: bool  # whether no parameter has had a gradient, and nothing was said of it
    _dtensor_layouts: dict[int, tuple[DeviceMesh, Any, Layout]]  # mesh, placements; by id(tensor)
    _step_tables: dict[Any, StepTables]  # by step_tables.tables_key(), last used last
    _plans_of_others: dict[Any, Plan]  # the same, of steps in which only other ranks have gradients
    _agreed: set[Any]  # what ranks have agreed on: see plan.Plan
    _captured: list[StepTables]  # those that CUDA graphs read at each replay: never freed, never written to
    _wrapper: str | None  # what replaced the parameters, if anything did; copied
    _released: object | None  # the handle of release_gradients, if it is in use
    _full_param_groups: Sequence[Group] | None  # of the unsharded model, see number_as()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the scale of the loss may be left to the step: yes, if ``torch.amp.GradScaler`` asks.

        Others take a yes for gradients that are still scaled when they are clipped: Lightning then refuses
        ``gradient_clip_val``, in bfloat16 too, where nothing is scaled.
        """
        return isinstance(sys._getframe(1).f_locals.get("self"), torch.amp.GradScaler)

    def _clear_caches(self) -> None:
        """Start with empty caches."""
        self._layouts, self._dtensor_layouts, self._step_tables, self._captured = {}, {}, {}, []
        self._presets, self._untrained = {}, True
        self._plans_of_others, self._agreed = {}, set()
        self._wrapper = self._released = self._full_param_groups = None

    # ---- what is said ---------------------------------------------------------------------------------

    def _note_training(self, groups: Groups) -> None:
        """Note that parameters have gradients.

        Not so of a step at the learning rate 0, such as that with which ``torch.distributed.checkpoint``
        makes the state, with gradients of its own.
        """
        if self._untrained:
            rates = [group["lr"] for group, _ in groups]
            self._untrained = all(getattr(lr, "is_cpu", True) and not lr for lr in rates)

    def _say_untrained(self) -> None:
        """Warn, once, where a step has found no gradient at all, and none has ever come.

        No error: the optimizer of a network whose turn comes later may be stepped without gradients, and so
        may be one that has trained. A warning that says what is so is never wrong. A wrapper steps its own
        tensors, group by group; released gradients are gone at the step; frozen parameters need none.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        in_use = self._wrapper is not None or self._released is not None
        if params and not in_use and not any(p.grad is not None for p in params):
            self._untrained = False
            tensor_checks.warn_of_no_gradient(params)

    def _note_presets(self) -> None:
        """Note the preset of each param group, and the options that it has chosen."""
        self._presets = {i: (group, presets.chosen(group)) for i, group in enumerate(self.param_groups)}

    def _check_preset(self, index: int) -> None:
        """Raise RuntimeError where the preset of a param group was changed without its options."""
        group = self.param_groups[index]
        of, chosen = self._presets.get(index, (None, {}))
        if of is not group or group["preset"] != chosen["preset"]:
            if of is group:
                presets.check_effect(group, chosen, f"param group {index}")
            self._presets[index] = group, presets.chosen(group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``.

        Raises:
            ValueError: ``set_to_none=False`` where gradients are released, which has parameters without a
                gradient stepped as if it were zero.
        """
        if self._released is not None and not set_to_none:
            raise ValueError(
                "zero_grad(set_to_none=False): released gradients are None. Use set_to_none=True"
            )
        super().zero_grad(set_to_none)

    # ---- a set of tensors ---------------------------------------------------------------------------

    def _given(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """What a step is given: all tensors; after released gradients, those that still have one."""
        for index, group in enumerate(self.param_groups):
            late = self._released is not None
            yield index, [p for p in group["params"] if p.grad is not None] if late else group["params"]

    def _with_gradients(self, tensors: Iterable[tuple[int, Sequence[Tensor]]]) -> tuple[Groups, Absent]:
        """The tensors to step, by param group; and the DTensors that only other ranks may have to step.

        Of those nobody knows here: they take part in what the ranks tell each other, whether or not they have
        a gradient.
        """
        found: Groups = []
        absent: Absent = []
        for index, members in tensors:
            group = self.param_groups[index]
            options.check_options(group, f"param group {index}")
            self._check_preset(index)
            params = [p for p in members if p.grad is not None]
            if params:
                found.append((group, params))
            if len(params) < len(members) and has_dtensors(members):
                absent += [
                    (group, p)
                    for p in members
                    if p.grad is None and p.requires_grad and isinstance(p, DTensor)
                ]
        return found, absent

    def _mode(self) -> Mode:
        limit = options.one_max_grad_norm(self.param_groups)
        return Mode(self._released is not None, bool(limit), self._agreed)

    def _plan_of_others(self, absent: Absent) -> Plan | None:
        """The plan of a step in which no tensor of this rank has a gradient; None: it is no other rank's."""
        mode, device = self._mode(), local_tensor(absent[0][1]).device
        options_of = [group for group, _ in absent]
        key = (
            step_plan.plan_key(options_of, mode),
            step_tables.tables_key([], absent, mode.per_parameter),
        )
        if key not in self._plans_of_others:
            known = self._absent_layouts([], absent)
            self._plans_of_others[key] = step_plan.plan([], [], known, device, mode)
        plan = self._plans_of_others[key]
        return plan if plan.collectives else None

    def _tables_for(self, groups: Groups, absent: Absent) -> StepTables:
        """The tables of a set of tensors; made anew if anything but the gradients has moved.

        Refuses by name what cannot be stepped, before anything is changed.
        """
        try:
            tensors = StepTensors(groups, self.state)
        except RuntimeError:  # a sparse gradient has no address
            self._check(groups)
            raise
        key = step_tables.tables_key(groups, absent, self._released is not None)
        ready = self._step_tables.pop(key, None)
        if ready is None or not ready.serves(tensors):
            ready = self._build_tables(groups, absent, tensors, ready)
        if capturing() and not ready.captured:
            if any(group["orthogonalize"] for group, _ in groups):
                raise RuntimeError(hidden.CAPTURED)
            ready.captured = True
            self._captured.append(ready)
        self._step_tables[key] = ready
        if len(self._step_tables) > MAX_CACHED_TABLES + sum(
            len(group["params"]) for group in self.param_groups
        ):
            del self._step_tables[next(iter(self._step_tables))]
        ready.hold(tensors)
        return ready

    def _build_tables(
        self, groups: Groups, absent: Absent, tensors: StepTensors, before: StepTables | None
    ) -> StepTables:
        """New tables of a set of tensors, which get a state if they have none."""
        layouts = self._check(groups)
        if capturing():
            raise RuntimeError(tensor_checks.captured(before is not None))
        for (group, params), known in zip(groups, layouts, strict=True):
            counted = counts_steps(group)
            for p, layout in zip(params, known, strict=True):
                self._init_state(p, layout, group, counted)
        tensors.look_up(self.state)
        known_absent = self._absent_layouts(groups, absent)
        return step_tables.build(tensors, layouts, known_absent, before, self._mode())

    def _absent_layouts(self, groups: Groups, absent: Absent) -> list[AbsentLayout]:
        """The layouts of DTensors without a gradient, in the order of ``param_groups``."""
        if not absent:
            return []
        stepped, missing = {id(p) for _, params in groups for p in params}, {id(p) for _, p in absent}
        found, before = [], 0
        for index, position, number, p in self._numbered_tensors():
            before += id(p) in stepped
            if id(p) in missing:
                layout = self._find_layout(index, position, number, p)
                found.append(AbsentLayout(self.param_groups[index], layout, before))
        return found

    def _check(self, groups: Groups) -> list[list[Layout]]:
        """The layouts of the tensors of a step, by param group; raises if one cannot be stepped."""
        stepped = {id(group): set(map(id, params)) for group, params in groups}
        layouts: list[list[Layout]] = [[] for _ in self.param_groups]
        for index, position, number, p in self._numbered_tensors():
            if id(p) in stepped.get(id(self.param_groups[index]), ()):
                name, group = self._name_of(index, position), self.param_groups[index]
                if group["fused"]:
                    tensor_checks.check_has_fused(p, name)
                tensor_checks.check_gradient(name, p)
                layout = self._find_layout(index, position, number, p)
                if group["orthogonalize"]:
                    hidden.check_matrices(name, p, layout.local_shards[0].parameter)
                if self._wrapper is None:  # a wrapper's tensors have not the parameters' shapes
                    tensor_checks.check_structure(name, self.state.get(p, {}), p.shape, layout, group)
                    if p.dtype == torch.float16 and group["stochastic_rounding"]:
                        tensor_checks.warn_of_float16(name)
                layouts[index].append(layout)
        return [known for known in layouts if known]

    def _find_layout(self, index: int, position: int, number: int, p: Tensor) -> Layout:
        """The layout of a tensor of ``param_groups``; raises if its layers are not known."""
        if isinstance(p, DTensor):
            # It says itself how it is sharded. Accelerate puts DTensors in place of the given parameters.
            mesh, placements, layout = self._dtensor_layouts.get(id(p), (None, None, None))
            placed = (p.device_mesh, p.placements)
            if (
                layout is None
                or (mesh, placements) != placed
                or layout.local_shards[0].parameter.numel != p.numel()
                or layout.local_shards[0].parameter.number != number
            ):
                name = self._name_of(index, position)
                granularity = self.param_groups[index]["granularity"]
                layout = sharded(describe(name, p.shape, granularity, number), p)
                self._dtensor_layouts[id(p)] = (*placed, layout)
                self._step_tables.clear()  # they know layouts by id
                self._plans_of_others.clear()
            return layout
        known = self._noted_layout(number, p)
        name = self._name_of(index, position)
        if known is None and self._wrapper is None and type(p) is nn.Parameter:
            # It has come into param_groups without add_param_group, as where Lightning resumes.
            tensor_checks.check_parameter(name, p)
            if not tensor_checks.is_fsdp1(p):
                known = self._note_layout(
                    p, describe(name, p.shape, self.param_groups[index]["granularity"], number)
                )
        if known is None or known.numel != p.numel() or tensor_checks.is_fsdp1(p):
            raise RuntimeError(tensor_checks.unknown_layers(name, p, known, self._wrapper))
        return known

    def _init_state(self, p: Tensor, layout: Layout, group: Group, counted: bool) -> None:
        state = self.state[p]
        if "exp_avg_sq" not in state and "exp_avg_sq_row" not in state:
            state.update(second_moment.allocate(p, layout))
        if "exp_avg" not in state and group["betas"][0] != 0:
            state.update(momentum.allocate(p, layout, group["momentum_dtype"]))
        if "step" not in state and counted:
            state["step"] = step_counts.allocate(p, layout)
        if group["orthogonalize"] and group["row_normalize"] and second_moment.DIRECTION_AVG_SQ not in state:
            state[second_moment.DIRECTION_AVG_SQ] = second_moment.allocate_direction(p, layout)

    def _numbered_tensors(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """Every tensor of ``param_groups``: index of the group, position in it, number, tensor.

        The number is that of the parameters before it, frozen ones too, the same however they are sharded.
        """
        numbers = self.parameter_numbers()
        for index, group in enumerate(self.param_groups):
            for position, p in enumerate(group["params"]):
                if id(p) not in numbers:
                    raise ValueError(tensor_checks.not_in_full_param_groups(self._name_of(index, position)))
                yield index, position, numbers[id(p)], p

    def parameter_numbers(self) -> dict[int, int]:
        """The number of each parameter, by id: its place in ``param_groups``, or as ``number_as`` said."""
        params = (p for group in self._full_param_groups or self.param_groups for p in group["params"])
        return {id(p): number for number, p in enumerate(params)}

    def _name_of(self, group: int, position: int) -> str:
        """The name of a parameter for an error message."""
        names = self.param_groups[group].get("param_names")
        if names is not None and position < len(names):
            return str(names[position])
        return f"parameter {position} of param group {group}"

    def _note_layouts(self, group: int) -> None:
        """Note the layouts of the tensors of a param group, each of which is unsharded, or a DTensor."""
        granularity = self.param_groups[group]["granularity"]
        for index, position, number, p in self._numbered_tensors():
            if index == group:
                name = self._name_of(index, position)
                try:
                    parameter = describe(name, p.shape, granularity, number)
                except LayoutError:
                    if p.requires_grad:
                        raise
                    continue  # frozen: codes of quantised weights may have any shape
                if self.param_groups[group]["orthogonalize"] and p.requires_grad and p.numel():
                    hidden.check_matrices(name, p, parameter)
                if not isinstance(p, DTensor):
                    self._note_layout(p, parameter)
        self._step_tables = {}

    def _note_layout(self, p: Tensor, parameter: Parameter) -> Layout:
        """Note that a tensor is a full parameter."""
        self._layouts[id(p)] = layout = unsharded(parameter)
        self._step_tables = {}  # they know layouts by id
        return layout

    def _noted_layout(self, number: int, p: Tensor) -> Layout | None:
        """What was noted of a tensor; with the number that it has now, where no wrapper has given it one."""
        known = self._layouts.get(id(p))
        if known is None or self._wrapper is not None:
            return known
        parameter = known.local_shards[0].parameter
        return (
            known if parameter.number == number else self._note_layout(p, replace(parameter, number=number))
        )

    # ---- for wrappers that give each rank parameters ------------------------------------------------

    def number_as(self, param_groups: Sequence[Group]) -> None:
        """Number the parameters as an optimizer of the full model does, of which this one has a part.

        The random bits for rounding depend on a parameter's number. ``ZeroRedundancyOptimizer`` makes an
        optimizer of each rank's own parameters, which can only count these. Told once, before the first step,
        it has the bits of DDP: ``optimizer.optim.number_as(optimizer.param_groups)``. A copy has to be told
        again.

        Args:
            param_groups: of the full model. Kept, and looked at again when a param group is added.

        Raises:
            ValueError: a parameter of this optimizer is not in them, or a wrapper has sharded the parameters.
        """
        if self._wrapper is not None:
            raise ValueError(f"number_as: {self._wrapper} has numbered the parameters. Leave the call out")
        before, self._full_param_groups = self._full_param_groups, param_groups
        try:
            for index in range(len(self.param_groups)):
                self._note_layouts(index)
        except ValueError:
            self._full_param_groups = before
            raise
        self._dtensor_layouts.clear()

    # ---- for wrappers that shard parameters ----------------------------------------------------------

    def bind(self, wrapper: str, layouts: Sequence[tuple[int, Tensor, Layout]]) -> None:
        """Tell the optimizer that a wrapper has replaced the parameters by tensors sharded otherwise.

        From here on only these tensors are accepted; their state is allocated at once (a wrapper may
        step them one by one and link their states after the first).

        Args:
            wrapper: the wrapper's name, for messages.
            layouts: for every tensor that will be stepped, the index of its param group, the tensor
                and its layout.

        Raises:
            ValueError: a layout of another size than its tensor, a tensor of ``param_groups``
                without a layout, or ``max_grad_norm`` in use: a wrapper that steps its groups one by
                one never shows the norm of the whole gradient.
        """
        given = {id(tensor): layout for _, tensor, layout in layouts}
        self.refuse_clipping(wrapper)
        if self._released is not None:
            raise ValueError(options.wrapped_and_released(wrapper))
        for index, group in enumerate(self.param_groups):
            for position, p in enumerate(group["params"]):
                if id(p) not in given or given[id(p)].numel != p.numel():
                    raise ValueError(f"{wrapper}: no layout of {self._name_of(index, position)}")
            if group["orthogonalize"]:
                why = f"{wrapper} gives each rank a part of all parameters"
                raise ValueError(hidden.sharded_matrix(f"param group {index}", why))
        self._wrapper, self._full_param_groups = wrapper, None  # the layouts have the numbers
        self._layouts = given
        self._step_tables = {}
        counted = [*map(counts_steps, self.param_groups)]
        for index, tensor, layout in layouts:
            self._init_state(tensor, layout, self.param_groups[index], counted[index])

    def refuse_clipping(self, wrapper: str) -> None:
        """Raise ValueError if ``max_grad_norm`` is in use, for a wrapper under which it cannot be right."""
        for index, group in enumerate(self.param_groups):
            if group["max_grad_norm"]:
                raise ValueError(
                    f"param group {index}: max_grad_norm={group['max_grad_norm']} cannot be used under "
                    f"{wrapper}, which clips by itself: set gradient_clipping in the DeepSpeed config and "
                    "leave max_grad_norm out"
                )

    def released_by(self, handle: object | None) -> None:
        """Note that :func:`novoscale.release_gradients` steps parameters in the backward pass; None: no more.

        A gradient that is not finite then keeps its own parameter from a step, and no other.

        Raises:
            RuntimeError: it does already.
            ValueError: a wrapper steps the parameters.
        """
        if handle is not None and self._wrapper is not None:
            raise ValueError(options.wrapped_and_released(self._wrapper))
        if handle is not None and self._released is not None:
            raise RuntimeError("release_gradients is in use for this optimizer: remove() that handle first")
        self._released = handle
