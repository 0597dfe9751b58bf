"""What ``novoscale doctor`` says of a script and a config is what the frameworks do with them.

All scripts are run in two processes, with NovoGrad registered and without: starting one takes seconds.
"""

import json

import doctor_ranks
import pytest

from novoscale.doctor import diagnose
from novoscale.tools.local_ranks import preload, run_ranks

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
TESTED = {"zero_allow_untested_optimizer": False}
KEPT = {"zero_force_ds_cpu_optimizer": False}
NOVOGRAD = {"type": "NovoGrad", "params": {"lr": 0.1}}
GIVEN = "model_parameters=params"
DUMMY = "DummyOptim(model.parameters())"
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


RUNS = [
    (zero({"type": "AdamW"}), PLAIN, GIVEN),
    (zero({"type": "Adam"}, **OFFLOAD), PLAIN, GIVEN),
    (zero({"type": "AdamW", "params": {"torch_adam": True}}, **OFFLOAD), PLAIN, GIVEN),
    (zero({"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False}}), PLAIN, GIVEN),
    (zero({"type": "NAdam"}), PLAIN, GIVEN),
    (zero({"type": "novograd"}, **OFFLOAD), IMPORT + PLAIN, GIVEN),
    # The script's wins over the config's.
    (zero({"type": "AdamW"}), IMPORT + PLAIN, HANDED),
    (zero(NOVOGRAD), IMPORT + PLAIN, "optimizer=torch.optim.AdamW(params)"),
    (zero(more=KEPT, **OFFLOAD), IMPORT + PLAIN, HANDED),
    (zero(NOVOGRAD), IMPORT + ACCELERATE, DUMMY),
    (zero(**OFFLOAD), ACCELERATE, "torch.optim.NAdam(model.parameters())"),
    # Without the import, not even NovoGrad's own guard.
    (zero(**OFFLOAD), ACCELERATE, CLIENT),
    (zero(more=KEPT, **OFFLOAD), IMPORT + ACCELERATE, CLIENT),
    (zero(), TRAINER, "optimizers=(NovoGrad(model.parameters(), lr=0.1), None)"),
    (zero(**OFFLOAD), TRAINER, CLS),
    (zero({"type": "NAdam"}), TRAINER, CLS),
    (zero(), IMPORT + TRAINER, CLS),
]
UNSUPPORTED = "UnsupportedConfigError"
BF16 = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
NO_ZERO = {"train_micro_batch_size_per_gpu": 4, "optimizer": NOVOGRAD}
DROPPED = "optimizers=(NovoGrad([model.lm_head.weight]), None)"


def of_params(**options):
    return zero({"type": "NovoGrad", "params": options})


def offloaded(**options):
    return zero(NOVOGRAD, stage=3, offload_optimizer={"device": "cpu", **options})


# SuperOffload and fp16 stop on CPU ranks for reasons of their own.
STOPS = [
    (zero(NOVOGRAD), PLAIN, GIVEN, "registered_in_time", "has not been registered"),
    (zero(**OFFLOAD), IMPORT + PLAIN, HANDED, "replaced", "ZeRORuntimeException"),
    (zero(NOVOGRAD), IMPORT + ACCELERATE, CLIENT, "replaced", "in the code at the same time"),
    (zero(), ACCELERATE, DUMMY, "dummy_without_a_name", "DummyOptim"),
    (zero(**OFFLOAD), IMPORT + ACCELERATE, CLIENT, "replaced", "OptimizerReplacedError"),
    (zero(), IMPORT + TRAINER, DROPPED, "replaced", "OptimizerReplacedError"),
    (zero(NOVOGRAD), IMPORT + TRAINER, "", "trainer_matches", "mismatch TrainingArguments"),
    (
        NO_ZERO,
        IMPORT + ACCELERATE,
        DUMMY,
        "zero_section_is_compulsory",
        "specify the ZeRO optimization config",
    ),
    (of_params(betas="auto"), IMPORT + ACCELERATE, DUMMY, "auto_values", "optimizer.params.betas"),
    (of_params(lr="auto"), IMPORT + PLAIN, GIVEN, "auto_values", "lr must be a number"),
    (of_params(max_grad_norm=1.0), IMPORT + PLAIN, GIVEN, "max_grad_norm_in_params", "gradient_clipping"),
    (of_params(torch_adam=True), IMPORT + PLAIN, GIVEN, "options_exist", "no option 'torch_adam'"),
    (
        zero(),
        IMPORT + PLAIN,
        "optimizer=NovoGrad(params, max_grad_norm=1.0)",
        "clipping_in_the_script",
        "clip",
    ),
    (zero({"type": "nadam"}), PLAIN, GIVEN, "optimizer_is_known", "not a supported DeepSpeed"),
    (zero({"type": "NAdam"}, TESTED), PLAIN, GIVEN, "untested_optimizer", "untested"),
    (
        zero(NOVOGRAD, ofload=1),
        IMPORT + PLAIN,
        GIVEN,
        "refused_by_deepspeed",
        "Extra inputs are not permitted",
    ),
    (zero("NovoGrad"), IMPORT + PLAIN, GIVEN, "sections_are_objects", "AttributeError"),
    (zero(NOVOGRAD, elastic_checkpoint=True), IMPORT + PLAIN, GIVEN, "elastic_checkpoint", UNSUPPORTED),
    (zero(NOVOGRAD, AUTOCAST), IMPORT + PLAIN, GIVEN, "autocast_to_float16", UNSUPPORTED),
    (zero(NOVOGRAD, BF16), IMPORT + PLAIN, GIVEN, "master_weights", UNSUPPORTED),
    (offloaded(ratio=0.5), IMPORT + PLAIN, GIVEN, "twin_flow", UNSUPPORTED),
    (zero(NOVOGRAD, zenflow={}, **OFFLOAD), IMPORT + PLAIN, GIVEN, "zenflow", UNSUPPORTED),
    (offloaded(device="nvme", nvme_path="/tmp"), IMPORT + PLAIN, GIVEN, "nvme", UNSUPPORTED),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of each case what the doctor says, and what happens."""
    said, texts = [], []
    for config, script, how, *_ in [*RUNS, *STOPS]:
        folder = tmp_path_factory.mktemp("case")
        (folder / "ds.json").write_text(json.dumps(config))
        texts.append(script.format(config=str(folder / "ds.json"), folder=str(folder), how=how))
        (folder / "train.py").write_text(texts[-1])
        said.append(diagnose(folder / "ds.json", folder / "train.py", ranks=1))
    happened = {}
    for registers in (True, False):
        mine = [text for text in texts if text.startswith(IMPORT) is registers]
        (results,) = run_ranks(doctor_ranks.run_all, 1, mine, timeout=200)
        happened |= dict(zip(mine, results, strict=True))
    return list(zip(said, (happened[text] for text in texts), strict=True))


@pytest.mark.parametrize("case", RUNS, ids=range(len(RUNS)))
def test_the_optimizer_that_it_names_is_the_one_that_runs(outcomes, case):
    found, ran = outcomes[RUNS.index(case)]
    assert found.runs.optimizer is not None
    assert found.runs.optimizer.rpartition(".")[2] == ran


@pytest.mark.parametrize("case", STOPS, ids=[case[3] for case in STOPS])
def test_what_it_says_is_refused_stops(outcomes, case):
    *_, rule, error = case
    found, ran = outcomes[len(RUNS) + STOPS.index(case)]
    assert rule in [finding.rule for finding in found.findings if finding.severity == "wrong"]
    assert error in ran
