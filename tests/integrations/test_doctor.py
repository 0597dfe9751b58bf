"""What ``novoscale doctor`` says of a script and a config is what the frameworks do with them."""

import json

import doctor_ranks
import pytest

from novoscale.doctor import diagnose
from novoscale.ranks import preload, run_ranks

preload("transformers.trainer", "transformers.models.gpt2.modeling_gpt2")

IMPORT = "import novoscale.integrations.deepspeed\n"
PLAIN = """
import deepspeed, torch
from novoscale import NovoGrad
model = torch.nn.Linear(8, 4)
params = list(model.parameters())
engine, *_ = deepspeed.initialize(model=model, config={config!r}, {how})
ran = engine.basic_optimizer
"""
ACCELERATE = """
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DummyOptim, InitProcessGroupKwargs
from novoscale import NovoGrad
plugin = DeepSpeedPlugin(hf_ds_config={config!r})
gloo = InitProcessGroupKwargs(backend="gloo")
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])
model = torch.nn.Linear(8, 4)
optimizer = {how}
model, optimizer = accelerator.prepare(model, optimizer)
ran = accelerator.deepspeed_engine_wrapped.engine.basic_optimizer
"""
TRAINER = """
import trainer_ranks
from accelerate import PartialState
PartialState(backend="gloo")
from transformers import Trainer, TrainingArguments
from novoscale import NovoGrad
model = trainer_ranks.model()
arguments = TrainingArguments(
    output_dir={folder!r}, deepspeed={config!r}, max_steps=1, per_device_train_batch_size=4, report_to=[],
    save_strategy="no", disable_tqdm=True, accelerator_config=dict(use_configured_state=True)
)
trainer = Trainer(model, arguments, train_dataset=trainer_ranks.rows(), {how})
trainer.train()
ran = trainer.model_wrapped.basic_optimizer
"""
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
KEPT = {"zero_force_ds_cpu_optimizer": False}
NOVOGRAD = {"type": "NovoGrad", "params": {"lr": 0.1}}
CLIENT = "NovoGrad(model.parameters(), lr=0.1)"
HANDED = "optimizer=NovoGrad(params, lr=0.1)"
CLS = "optimizer_cls_and_kwargs=(NovoGrad, dict(lr=0.1))"


def zero(optimizer=None, more=None, stage=2, **section):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **section},
        **(more or {}),
    }
    return {**config, "optimizer": optimizer} if optimizer else config


def look_and_run(folder, config, script, how):
    """What the doctor says, and what happens."""
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    text = script.format(config=str(path), folder=str(folder), how=how)
    (folder / "train.py").write_text(text)
    return diagnose(path, folder / "train.py", ranks=1), run_ranks(doctor_ranks.run, 1, text)[0]


@pytest.mark.parametrize(
    ("config", "script", "how"),
    [
        (zero({"type": "AdamW"}), PLAIN, "model_parameters=params"),
        (zero({"type": "Adam"}, **OFFLOAD), PLAIN, "model_parameters=params"),
        (zero({"type": "AdamW", "params": {"torch_adam": True}}, **OFFLOAD), PLAIN, "model_parameters=params"),
        (
            zero({"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False}}),
            PLAIN,
            "model_parameters=params",
        ),
        (zero({"type": "NAdam"}), PLAIN, "model_parameters=params"),
        (zero({"type": "novograd"}, **OFFLOAD), IMPORT + PLAIN, "model_parameters=params"),
        # The script's wins over the config's.
        (zero({"type": "AdamW"}), IMPORT + PLAIN, HANDED),
        (zero(NOVOGRAD), IMPORT + PLAIN, "optimizer=torch.optim.AdamW(params)"),
        (zero(more=KEPT, **OFFLOAD), IMPORT + PLAIN, HANDED),
        (zero(NOVOGRAD), IMPORT + ACCELERATE, "DummyOptim(model.parameters())"),
        (zero(**OFFLOAD), ACCELERATE, "torch.optim.NAdam(model.parameters())"),
        # Without the import, not even NovoGrad's own guard.
        (zero(**OFFLOAD), ACCELERATE, CLIENT),
        (zero(more=KEPT, **OFFLOAD), IMPORT + ACCELERATE, CLIENT),
        (zero(), TRAINER, "optimizers=(NovoGrad(model.parameters(), lr=0.1), None)"),
        (zero(**OFFLOAD), TRAINER, CLS),
        (zero({"type": "NAdam"}), TRAINER, CLS),
        (zero(), IMPORT + TRAINER, CLS),
    ],
    ids=str,
)
def test_the_optimizer_that_it_names_is_the_one_that_runs(tmp_path, config, script, how):
    found, ran = look_and_run(tmp_path, config, script, how)
    assert found.runs.optimizer is not None
    assert found.runs.optimizer.rpartition(".")[2] == ran


@pytest.mark.parametrize(
    ("config", "script", "how", "rule", "error"),
    [
        (zero(NOVOGRAD), PLAIN, "model_parameters=params", "registered_in_time", "not a supported DeepSpeed"),
        (zero(**OFFLOAD), IMPORT + PLAIN, HANDED, "replaced", "ZeRORuntimeException"),
        (zero(NOVOGRAD), IMPORT + ACCELERATE, CLIENT, "replaced", "in the code at the same time"),
        (zero(), ACCELERATE, "DummyOptim(model.parameters())", "dummy_without_a_name", "DummyOptim"),
        (zero(**OFFLOAD), IMPORT + ACCELERATE, CLIENT, "replaced", "OptimizerReplacedError"),
        (zero(), IMPORT + TRAINER, "optimizers=(NovoGrad([model.lm_head.weight]), None)", "replaced", "Replaced"),
        (zero(NOVOGRAD), IMPORT + TRAINER, "", "trainer_matches", "mismatch TrainingArguments"),
        (
            {"train_micro_batch_size_per_gpu": 4, "optimizer": NOVOGRAD},
            IMPORT + ACCELERATE,
            "DummyOptim(model.parameters())",
            "zero_section_is_compulsory",
            "specify the ZeRO optimization config",
        ),
        (
            zero({"type": "NovoGrad", "params": {"betas": "auto"}}),
            IMPORT + ACCELERATE,
            "DummyOptim(model.parameters())",
            "auto_values",
            "optimizer.params.betas",
        ),
        (
            zero({"type": "NovoGrad", "params": {"lr": "auto"}}),
            IMPORT + PLAIN,
            "model_parameters=params",
            "auto_values",
            "lr must be a number",
        ),
        (zero(), IMPORT + PLAIN, "optimizer=NovoGrad(params, max_grad_norm=1.0)", "clipping_in_the_script", "clip"),
    ],
    ids=str,
)  # fmt: skip
def test_what_it_says_is_refused_stops(tmp_path, config, script, how, rule, error):
    found, ran = look_and_run(tmp_path, config, script, how)
    assert rule in [finding.rule for finding in found.findings if finding.severity == "wrong"]
    assert error in ran


UNSUPPORTED = "UnsupportedConfigError"


@pytest.mark.parametrize(
    ("config", "rule", "error"),
    [
        (zero({"type": "NovoGrad", "params": {"max_grad_norm": 1.0}}), "max_grad_norm_in_params", "gradient_clipping"),
        (zero({"type": "NovoGrad", "params": {"torch_adam": True}}), "options_exist", "no option 'torch_adam'"),
        (zero({"type": "nadam"}), "optimizer_is_known", "not a supported DeepSpeed"),
        (zero({"type": "NAdam"}, {"zero_allow_untested_optimizer": False}), "untested_optimizer", "untested"),
        (zero(NOVOGRAD, ofload=1), "refused_by_deepspeed", "Extra inputs are not permitted"),
        (zero("NovoGrad"), "sections_are_objects", "AttributeError"),
        (zero(NOVOGRAD, elastic_checkpoint=True, stage=1), "elastic_checkpoint", UNSUPPORTED),
        (zero(NOVOGRAD, {"torch_autocast": {"enabled": True, "dtype": "float16"}}), "autocast_to_float16", UNSUPPORTED),
        (zero(NOVOGRAD, {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}), "master_weights", UNSUPPORTED),
        (zero(NOVOGRAD, stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "twin_flow", UNSUPPORTED),
        (zero(NOVOGRAD, stage=3, offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload", UNSUPPORTED),
        (zero(NOVOGRAD, offload_optimizer={"device": "cpu"}, zenflow={}), "zenflow", UNSUPPORTED),
        (zero(NOVOGRAD, stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}), "nvme", UNSUPPORTED),
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_it_says_are_refused_stop(tmp_path, config, rule, error):
    found, ran = look_and_run(tmp_path, config, IMPORT + PLAIN, "model_parameters=params")
    assert rule in [finding.rule for finding in found.findings if finding.severity == "wrong"]
    assert error in ran
