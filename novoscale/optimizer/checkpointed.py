"""An optimizer whose state is saved and loaded bit for bit, however its parameters are sharded."""

from __future__ import annotations

import warnings
from collections import defaultdict
from functools import partial
from typing import Any

import torch.distributed as dist

from novoscale.checkpoint import kinds, reshard
from novoscale.checkpoint.imported import state_dicts
from novoscale.checkpoint.imported.from_adam import Target
from novoscale.checkpoint.state_dict import (
    keep_structural_options,
    loaded_state,
    ordinary_tensors,
    recorded_load,
    saved_state,
)
from novoscale.optimizer import options
from novoscale.optimizer.layerwise import LayerwiseOptimizer


class CheckpointedOptimizer(LayerwiseOptimizer):
    """A layerwise optimizer with ``state_dict`` and ``load_state_dict``."""

    # Private, not copied.
    _loading: dict[str, Any] | None  # the state dict, while it is loaded

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``, in a form that does not depend on how parameters are
        sharded.

        Of moments in blocks that are sharded, or whose rows are no whole blocks, it has copies. Where tensor
        parallelism shards such rows, it is a collective. Under a wrapper it says what each tensor holds; else
        each state has markers, empty tensors whose keys say of what kind it is: see ``checkpoint.kinds``.
        """
        for group in self.param_groups:
            options.plain_numbers(group)
        kept = self.state
        self.state = defaultdict(dict, kept)
        for index, position, number, p in self._numbered_tensors():
            state = kept.get(p, {})
            if state and self._wrapper is not None:
                self.state[p] = reshard.flat_state(state, self._find_layout(index, position, number, p))
            elif state:
                if "exp_avg_scale" in state:
                    state = saved_state(p, state, self._find_layout(index, position, number, p))
                self.state[p] = kinds.marked(p, state, self.param_groups[index])
        try:
            return super().state_dict()
        finally:
            self.state = kept

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``, but every state keeps the bits that were saved.

        (torch casts state to the parameter's dtype: a float32 v of a bfloat16 parameter would lose
        half its digits.) Options come from the state dict, but for ``momentum_dtype``, ``granularity`` and
        ``orthogonalize``, which stay what they are: a first moment in another format is converted where that
        loses nothing, or with ``allow_lossy_load``. Load and save hooks run as usual.

        Takes the state of an Adam too, with ``allow_lossy_load``, and that of another NovoGrad: see
        ``checkpoint.imported`` and ``docs/coming-from.md``. A collective then, where layers are sharded.

        Raises:
            ValueError: a state that is not NovoGrad's, that belongs to other shapes or layers, or that would
                lose digits. Nothing has been changed then.
        """
        said: list[str] = []
        with ordinary_tensors(), recorded_load(self, partial(self._converted, said=said)) as record:
            self._loading = record
            try:
                super().load_state_dict(state_dict)
            finally:
                self._loading = None
        if said and not (dist.is_initialized() and dist.get_rank()):
            warnings.warn(said[0], stacklevel=2)

    def _converted(self, state_dict: dict[str, Any], said: list[str]) -> dict[str, Any]:
        """A state dict as it is, if it is this NovoGrad's; else as one, and what to say of it."""
        state_dicts.check_groups(state_dict, self.param_groups)
        if state_dicts.is_own(state_dict):
            return kinds.unmarked(state_dict)
        targets = [
            Target(
                self._name_of(index, position),
                p,
                self._find_layout(index, position, number, p),
                self.param_groups[index],
            )
            for index, position, number, p in self._numbered_tensors()
        ]
        found, line = state_dicts.converted(state_dict, self.param_groups, targets)
        said += [line] if line else []
        return found

    def _load(self, state: dict[str, Any], saved: dict[str, Any]) -> None:
        """Put the saved tensors in place of those that torch has cast to the parameters' dtypes."""
        keep_structural_options(state["param_groups"], self.param_groups)
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        for (index, position, number, p), key in zip(self._numbered_tensors(), keys, strict=True):
            if key in saved["state"]:
                name = self._name_of(index, position)
                layout = self._find_layout(index, position, number, p)
                group = state["param_groups"][index]
                origin = kinds.Origin(saved["param_groups"][index], self.param_groups[index])
                state["state"][p] = loaded_state(
                    name, saved["state"][key], p, layout, group, None if self._wrapper else origin
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_wrapper": self._wrapper}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = self.__dict__.get("_loading")
        if loading is not None:  # from load_state_dict
            self._load(state, loading)
        for group in state["param_groups"]:
            for option, default in state.get("defaults", self.__dict__.get("defaults", {})).items():
                group.setdefault(option, default)
        super().__setstate__(state)
        if "_layouts" not in self.__dict__:  # from deepcopy or pickle: a new object
            self._clear_caches()
            self._wrapper = state.get("_wrapper")
            for index in range(len(self.param_groups) if self._wrapper is None else 0):
                self._note_layouts(index)
        self._note_presets()

    def _clear_caches(self) -> None:
        super()._clear_caches()
        self._loading = None
