"""States of Adam in the layouts of different packages, and gradients of constant magnitudes."""

import math

import numpy as np
import torch


def MAGNITUDES(shapes, rank_one=False):  # noqa: N802
    rng = np.random.default_rng(9)
    found = []
    for shape in shapes:
        if rank_one and len(shape) > 1:  # as the matrix that a factored second moment holds without error
            split = min(range(1, len(shape)), key=lambda k: math.prod(shape[:k]) + math.prod(shape[k:]))
            rows, columns = (
                np.exp(rng.uniform(-2, 1, n)) for n in (math.prod(shape[:split]), math.prod(shape[split:]))
            )
            found.append(np.outer(rows, columns).reshape(shape))
        else:
            found.append(np.exp(rng.uniform(-2, 1, shape)))
    return found


def constant_magnitudes(shapes, steps, rank_one=False):
    """Gradients of which only the signs change from step to step."""
    rng = np.random.default_rng(4)
    sizes = MAGNITUDES(shapes, rank_one)
    return [[m * rng.choice([-1.0, 1.0], m.shape) for m in sizes] for _ in range(steps)]


def apex(saved):
    """apex.optimizers.FusedAdam: the steps are in the param group."""
    for group in saved["param_groups"]:
        steps = [int(saved["state"][index].pop("step")) for index in group["params"]]
        options = ("lr", "betas", "eps", "weight_decay", "params")
        kept = {option: group[option] for option in options}
        group.clear()
        group.update(kept, bias_correction=True, step=steps[0])
    return saved


def deepspeed(saved):
    """deepspeed.ops.adam.FusedAdam and DeepSpeedCPUAdam: numbers beside the moments."""
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    for group in saved["param_groups"]:
        for option in (
            "foreach",
            "capturable",
            "differentiable",
            "fused",
            "decoupled_weight_decay",
            "maximize",
        ):
            del group[option]
        group["bias_correction"] = True
    return saved


def bitsandbytes(saved):
    """bitsandbytes.optim.AdamW: 32 bits, other names, in a dict of their own since 0.49."""
    for state in saved["state"].values():
        inner = {"state1": state.pop("exp_avg"), "state2": state.pop("exp_avg_sq")}
        state.update(step=int(state["step"]), __bnb_optimizer_quant_state__=inner)
    for group in saved["param_groups"]:
        group.update(alpha=0.0, t_alpha=None, t_beta3=None)
    return saved


def older_bitsandbytes(saved):
    """The same, not in a dict of their own."""
    for state in bitsandbytes(saved)["state"].values():
        state.update(state.pop("__bnb_optimizer_quant_state__"))
    return saved


def bitsandbytes_eight_bits(saved):
    """In codes that are exact: each element has its own number."""
    for state in bitsandbytes(saved)["state"].values():
        inner = state["__bnb_optimizer_quant_state__"]
        for nth in (1, 2):
            values = inner[f"state{nth}"]
            if values.numel() < 20 or values.unique().numel() > 256:
                continue
            table = torch.zeros(256)
            known = values.unique()
            table[: len(known)] = known
            inner[f"qmap{nth}"] = table
            inner[f"absmax{nth}"] = torch.ones(math.ceil(values.numel() / 64))
            inner[f"state{nth}"] = torch.searchsorted(known, values).to(torch.uint8)
    return saved


def gathered(saved):
    """torch AdamW, saved with weights_only=True and numbers as steps."""
    for state in saved["state"].values():
        state["step"] = float(state["step"])
    return saved


FORMS = {
    f.__name__: f
    for f in (apex, deepspeed, bitsandbytes, older_bitsandbytes, bitsandbytes_eight_bits, gathered)
}
