"""Configs and scripts for the tests of ``novoscale doctor``."""

import json

from novoscale.doctor import diagnose

NOVOGRAD = {"type": "NovoGrad", "params": {"lr": 0.01, "preset": "adamw"}}
BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0}
IMPORT = "import novoscale.integrations.deepspeed\n"
ACCELERATE = "from accelerate import Accelerator\naccelerator = Accelerator()\n"
PREPARE = "model, optimizer = accelerator.prepare(model, optimizer)\n"
DUMMY = ACCELERATE + "from accelerate.utils import DummyOptim\noptimizer = DummyOptim(params)\n" + PREPARE
ADAMW = ACCELERATE + "import torch\noptimizer = torch.optim.AdamW(params)\n" + PREPARE
CLIENT = ACCELERATE + "from novoscale import NovoGrad\noptimizer = NovoGrad(params)\n" + PREPARE
PLAIN = "import deepspeed\nengine, *_ = deepspeed.initialize(model=model, model_parameters=params)\n"
HANDED = "import torch, deepspeed\nfrom novoscale import NovoGrad\n"
HANDED += "deepspeed.initialize(model=model, optimizer={}(params, lr=0.1))\n"
TRAINER = "from transformers import Trainer, TrainingArguments\nfrom novoscale import NovoGrad\n"
TRAINER += "arguments = TrainingArguments({})\ntrainer = Trainer(model, arguments{})\ntrainer.train()\n"
YAML = "distributed_type: DEEPSPEED\nnum_processes: 2\n{}deepspeed_config:\n  {}\n"
CLS = ", optimizer_cls_and_kwargs=(NovoGrad, {})"


def trainer(arguments="", more=""):
    return TRAINER.replace("Arguments({})", f"Arguments({arguments})").replace(
        "arguments{}", f"arguments{more}"
    )


def zero(stage=2, optimizer=NOVOGRAD, more=None, **section):
    config = {**BATCH, "zero_optimization": {"stage": stage, **section}, **(more or {})}
    return {**config, "optimizer": optimizer} if optimizer else config


def params(**options):
    return zero(optimizer={"type": "NovoGrad", "params": {"preset": "adamw", **options}})


def adamw(**options):
    return {"type": "AdamW", "params": options}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
KEPT = {"zero_force_ds_cpu_optimizer": False}
MATCHING = "learning_rate=0.01, per_device_train_batch_size=1"
UNTESTED = {"zero_allow_untested_optimizer": True}


def look(folder, config, script=None, **options):
    path = folder / ("config.yaml" if isinstance(config, str) else "config.json")
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    if script is None:
        return diagnose(path, **options)
    (folder / "train.py").write_text(script)
    return diagnose(path, folder / "train.py", **options)
