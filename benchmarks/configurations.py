"""The sharded configurations that are compared with one process, as ``novoscale verify`` takes them."""

from __future__ import annotations

from typing import Any

BF16 = {"bf16": {"enabled": True}}
CPU = {"device": "cpu"}


def zero(stage: int, more: dict[str, Any] | None = None, **section: Any) -> dict[str, Any]:
    """A DeepSpeed config."""
    small = {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000} if stage < 3 else {}
    return {
        "zero_optimization": {"stage": stage, **small, **section},
        "gradient_clipping": 1.0,
        **(more or {}),
    }


CONFIGURATIONS: dict[str, str | dict[str, Any]] = {
    "DDP": "ddp",
    "FSDP2": "fsdp2",
    "stage 0": zero(0),
    "stage 0, bf16": zero(0, BF16),
    **{f"stage {s}": zero(s) for s in (1, 2)},
    **{f"stage {s}, bf16": zero(s, BF16) for s in (1, 2)},
    "stage 1, bf16, grad_accum_dtype fp32 (BF16_Optimizer)": zero(
        1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    ),
    "stage 2, round_robin_gradients": zero(2, round_robin_gradients=True),
    "stage 2, parameter_alignment": zero(2, parameter_alignment=True),
    "stage 2, reduce_scatter off": zero(2, reduce_scatter=False),
    "stage 2, overlap_comm": zero(2, overlap_comm=True),
    "stage 2, 4 accumulation steps": zero(2, {"gradient_accumulation_steps": 4}),
    "stage 1, offload_optimizer": zero(1, offload_optimizer=CPU),
    "stage 2, offload_optimizer": zero(2, offload_optimizer=CPU),
    "stage 2, torch_autocast": zero(2, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    "stage 3": zero(3),
    "stage 3, sub-groups": zero(3, sub_group_size=3000),
    "stage 3, no persistent parameters": zero(3, stage3_param_persistence_threshold=0),
    "stage 3, bf16": zero(3, BF16),
    "stage 3, offload_optimizer": zero(3, offload_optimizer=CPU),
    "stage 3, offload_optimizer, offload_param": zero(3, offload_optimizer=CPU, offload_param=CPU),
}
