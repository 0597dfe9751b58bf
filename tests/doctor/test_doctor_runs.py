"""``novoscale doctor`` names the optimizer that will run."""

import pytest
from doctor_cases import (
    ADAMW,
    CLIENT,
    CLS,
    DUMMY,
    HANDED,
    IMPORT,
    KEPT,
    OFFLOAD,
    PLAIN,
    adamw,
    look,
    trainer,
    zero,
)


@pytest.mark.parametrize(
    ("config", "script", "optimizer"),
    [
        (zero(), None, "novoscale.NovoGrad"),
        (zero(optimizer={"type": "novograd"}), None, "novoscale.NovoGrad"),
        (zero(optimizer=adamw()), None, "FusedAdam"),
        (zero(optimizer=adamw(), **OFFLOAD), None, "DeepSpeedCPUAdam"),
        (zero(optimizer=adamw(), cpu_offload=True), None, "DeepSpeedCPUAdam"),
        (zero(optimizer=adamw(torch_adam=True), **OFFLOAD), None, "torch.optim.AdamW"),
        (zero(optimizer={"type": "Adam", "params": {"torch_adam": True}}), None, "torch.optim.AdamW"),
        (
            zero(optimizer={"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False}}),
            None,
            "torch.optim.Adam",
        ),
        (zero(optimizer={"type": "Lion"}, **OFFLOAD), None, "DeepSpeedCPULion"),
        (zero(optimizer={"type": "Adafactor"}), None, "torch.optim.Adafactor"),
        (zero(optimizer={"type": "Adafactory"}), None, None),
        (zero(optimizer=None), None, None),
        (zero(), DUMMY, "novoscale.NovoGrad"),
        (zero(), ADAMW, None),  # Accelerate refuses both
        (zero(optimizer=None), ADAMW, "torch.optim.AdamW"),
        (zero(optimizer=None), CLIENT, "novoscale.NovoGrad"),
        (zero(optimizer=None, **OFFLOAD), CLIENT, "DeepSpeedCPUAdam"),
        (zero(optimizer=None, **OFFLOAD), IMPORT + CLIENT, None),  # novoscale stops it
        (zero(), IMPORT + trainer(more=", optimizers=(NovoGrad(params), None)"), None),
        (zero(optimizer=None, more=KEPT, **OFFLOAD), CLIENT, "novoscale.NovoGrad"),
        (zero(), PLAIN, "novoscale.NovoGrad"),
        (zero(), HANDED.format("torch.optim.AdamW"), "torch.optim.AdamW"),
        (zero(optimizer=None, **OFFLOAD), HANDED.format("NovoGrad"), None),  # DeepSpeed refuses
        (zero(), trainer(), "novoscale.NovoGrad"),
        (zero(optimizer=None), trainer(more=", optimizers=(NovoGrad(params), None)"), "torch.optim.AdamW"),
        (zero(optimizer=None), trainer(more=CLS), "novoscale.NovoGrad"),
        (zero(optimizer=None, **OFFLOAD), trainer(more=CLS), "DeepSpeedCPUAdam"),
        (zero(optimizer=None, more=KEPT, **OFFLOAD), trainer(more=CLS), "novoscale.NovoGrad"),
        (zero(optimizer=adamw()), trainer(more=CLS), "FusedAdam"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\n", CLIENT, "novoscale.NovoGrad"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n", trainer(more=CLS), "novoscale.NovoGrad"),
    ],
)
def test_names_the_optimizer_that_will_run(tmp_path, config, script, optimizer):
    assert look(tmp_path, config, script).runs.optimizer == optimizer
