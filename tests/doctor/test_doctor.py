"""Each rule of ``novoscale doctor`` finds what it is for, names the key, and is silent about the rest."""

import json
from pathlib import Path

import pytest

from novoscale.doctor import RULES, ConfigError, Diagnosis, diagnose

ROOT = Path(__file__).parent.parent.parent
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


# ---- which optimizer runs ----------------------------------------------------------------------------


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


# ---- what is found -----------------------------------------------------------------------------------

YAML = "distributed_type: DEEPSPEED\nnum_processes: 2\n{}deepspeed_config:\n  {}\n"
INLINE = YAML.format("{}", "zero_stage: 2")


@pytest.mark.parametrize(
    ("rule", "severity", "where", "config", "script"),
    [
        # a config by itself
        ("sections_are_objects", "wrong", "optimizer", zero(optimizer="AdamW"), None),
        ("sections_are_objects", "wrong", "zero_optimization", {**BATCH, "zero_optimization": [2]}, None),
        ("sections_are_objects", "wrong", "optimizer.type", zero(optimizer={"type": 5}), None),
        (
            "sections_are_objects",
            "wrong",
            "optimizer.params",
            zero(optimizer={"type": "SGD", "params": []}),
            None,
        ),
        ("refused_by_deepspeed", "wrong", "zero_optimization.stage", zero(7), None),
        ("refused_by_deepspeed", "wrong", "zero_optimization.ofload", zero(ofload=True), None),
        (
            "refused_by_deepspeed",
            "wrong",
            "fp16",
            zero(more={k: {"enabled": True} for k in ("fp16", "bf16")}),
            None,
        ),
        (
            "refused_by_deepspeed",
            "wrong",
            "compression_training",
            zero(more={"compression_training": {}}),
            None,
        ),
        ("refused_by_deepspeed", "wrong", "config", {"zero_optimization": {"stage": 1}}, None),
        (
            "never_read_by_deepspeed",
            "warning",
            "gradient_cliping",
            zero(more={"gradient_cliping": 1.0}),
            None,
        ),
        ("refused_by_accelerate", "wrong", "mode", INLINE.format("mode: fast\n"), None),
        ("refused_by_accelerate", "wrong", "distributed_type", "distributed_type: MANY\n", None),
        ("one_process_on_cpu", "wrong", "use_cpu", INLINE.format("use_cpu: true\n"), None),
        (
            "zero_section_is_compulsory",
            "wrong",
            "zero_optimization",
            {**BATCH, "optimizer": NOVOGRAD},
            IMPORT + DUMMY,
        ),
        ("auto_values", "wrong", "optimizer.params.eps", params(eps="auto"), IMPORT + DUMMY),
        ("auto_values", "wrong", "optimizer.params.lr", params(lr="auto"), IMPORT + PLAIN),
        ("auto_values", "warning", "optimizer.params.eps", params(eps="auto"), None),
        (
            "auto_values",
            "warning",
            "steps_per_print",
            zero(more={"steps_per_print": "auto"}),
            IMPORT + trainer(),
        ),
        ("optimizer_is_known", "wrong", "optimizer.type", zero(optimizer={"type": "adafactor"}), None),
        ("optimizer_is_known", "wrong", "optimizer.type", zero(optimizer={"type": "ZeroOneAdam"}), None),
        (
            "untested_optimizer",
            "wrong",
            "zero_allow_untested_optimizer",
            zero(optimizer={"type": "SGD"}),
            None,
        ),
        ("adam_is_adamw", "note", "optimizer.type", zero(optimizer={"type": "Adam"}), None),
        (
            "max_grad_norm_in_params",
            "wrong",
            "optimizer.params.max_grad_norm",
            params(max_grad_norm=1.0),
            None,
        ),
        (
            "clipping_by_default",
            "note",
            "gradient_clipping",
            {"train_batch_size": 2, "optimizer": NOVOGRAD},
            None,
        ),
        # NovoGrad
        ("options_exist", "wrong", "optimizer.params.torch_adam", params(torch_adam=True), None),
        ("options_exist", "wrong", "optimizer.params.momentum_dtype", params(momentum_dtype="int9"), None),
        ("options_exist", "wrong", "optimizer.params.preset", params(preset="adam"), None),
        ("options_exist", "wrong", "optimizer.params.lr", params(lr="much"), None),
        ("options_exist", "wrong", "optimizer.params.normalize", params(normalize="norm"), None),
        ("zenflow", "wrong", "zero_optimization.zenflow", zero(zenflow={}), None),
        ("zenflow", "warning", "zero_optimization.zenflow", zero(zenflow={}, optimizer=adamw()), None),
        (
            "super_offload",
            "wrong",
            "zero_optimization.offload_optimizer.super_offload",
            zero(3, offload_optimizer={"device": "cpu", "super_offload": True}),
            None,
        ),
        (
            "twin_flow",
            "wrong",
            "zero_optimization.offload_optimizer.ratio",
            zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
            None,
        ),
        (
            "nvme",
            "wrong",
            "zero_optimization.offload_optimizer.device",
            zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}),
            None,
        ),
        (
            "nvme",
            "warning",
            "deepspeed_config.offload_optimizer_device",
            YAML.format("", "offload_optimizer_device: nvme"),
            None,
        ),
        (
            "master_weights",
            "wrong",
            "fp16.fp16_master_weights_and_grads",
            zero(more={"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}),
            None,
        ),
        (
            "master_weights",
            "wrong",
            "bf16.bf16_master_weights_and_grads",
            zero(more={"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}),
            None,
        ),
        (
            "elastic_checkpoint",
            "wrong",
            "zero_optimization.elastic_checkpoint",
            zero(elastic_checkpoint=True),
            None,
        ),
        (
            "autocast_to_float16",
            "wrong",
            "torch_autocast.dtype",
            zero(more={"torch_autocast": {"enabled": True, "dtype": "float16"}}),
            None,
        ),
        ("fsdp1", "wrong", "fsdp_config.fsdp_version", "distributed_type: FSDP\nfsdp_config: {}\n", CLIENT),
        ("fsdp1", "warning", "fsdp_config.fsdp_version", "distributed_type: FSDP\n", None),
        ("megatron", "warning", "distributed_type", "distributed_type: MEGATRON_LM\n", None),
        ("paper_preset", "note", "optimizer.params.preset", zero(optimizer={"type": "NovoGrad"}), None),
        ("adams_betas", "warning", "optimizer.params.betas", params(betas="auto"), None),
        ("needless_keys", "note", "zero_force_ds_cpu_optimizer", zero(more=KEPT, **OFFLOAD), None),
        (
            "offload_of_a_client",
            "warning",
            "zero_optimization.offload_optimizer.device",
            zero(optimizer=None, **OFFLOAD),
            None,
        ),
        # a script
        ("registered_in_time", "note", "optimizer.type", zero(), None),
        ("registered_in_time", "wrong", "train.py", zero(), DUMMY),
        ("registered_in_time", "wrong", "train.py:6", zero(), DUMMY + IMPORT),
        (
            "replaced",
            "wrong",
            "train.py:4",
            zero(),
            IMPORT + ADAMW.replace("import torch\n", "") + "import torch",
        ),
        ("replaced", "warning", "train.py:4", zero(optimizer=None, **OFFLOAD), ADAMW),
        ("replaced", "wrong", "train.py:5", zero(optimizer=None, **OFFLOAD), IMPORT + CLIENT),
        ("replaced", "wrong", "train.py:4", zero(), IMPORT + HANDED.format("torch.optim.AdamW")),
        ("replaced", "warning", "train.py:4", zero(optimizer=adamw()), IMPORT + HANDED.format("NovoGrad")),
        (
            "replaced",
            "wrong",
            "train.py:5",
            zero(),
            IMPORT + trainer(more=", optimizers=(NovoGrad(p), None)"),
        ),
        ("replaced", "wrong", "train.py:5", zero(optimizer=adamw()), IMPORT + trainer(more=CLS)),
        ("dummy_without_a_name", "wrong", "train.py:4", zero(optimizer=None), DUMMY),
        ("trainer_matches", "wrong", "optimizer.params.lr", params(lr=0.01), IMPORT + trainer("'out'")),
        ("trainer_matches", "note", "optimizer.params.lr", params(lr=0.01), IMPORT + trainer("**given")),
        (
            "trainer_matches",
            "wrong",
            "optimizer.params.betas",
            params(betas=[0.9, 0.98]),
            IMPORT + trainer("'out'"),
        ),
        (
            "trainer_matches",
            "note",
            "optimizer.params.betas",
            params(betas=[0.9, 0.98]),
            IMPORT + trainer("**given"),
        ),
        (
            "clipping_in_the_script",
            "wrong",
            "train.py:4",
            zero(optimizer=None),
            CLIENT.replace("(params)", "(params, max_grad_norm=1.0)"),
        ),
        (
            "clipping_in_the_script",
            "warning",
            "train.py:6",
            zero(),
            DUMMY + "accelerator.clip_grad_norm_(params, 2.0)",
        ),
        (
            "released_under_deepspeed",
            "wrong",
            "train.py:7",
            zero(),
            DUMMY + "from novoscale import release_gradients\nrelease_gradients(model, optimizer)",
        ),
        (
            "options_of_the_script",
            "wrong",
            "train.py:4",
            zero(optimizer=None),
            CLIENT.replace("(params)", "(params, amsgrad=True)"),
        ),
        (
            "optimizers_under_fsdp",
            "wrong",
            "train.py:4",
            "distributed_type: FSDP\n",
            trainer(more=", optimizers=(NovoGrad(params), None)"),
        ),
    ],
)
def test_a_rule_finds_and_names_the_key(tmp_path, rule, severity, where, config, script):
    found = look(tmp_path, config, script)
    shown = [(f.rule, f.severity, f.where.replace(f"{tmp_path}/", "")) for f in found.findings]
    assert (rule, severity, where) in shown
    assert found.passed == all(f.severity != "wrong" for f in found.findings)


@pytest.mark.parametrize(
    ("rule", "config", "script"),
    [
        ("refused_by_deepspeed", zero(3, stage3_prefetch_bucket_size="auto"), None),
        ("never_read_by_deepspeed", zero(more={"tensorboard": {"enabled": False}, "aio": {}}), None),
        ("auto_values", params(lr="auto", weight_decay="auto"), IMPORT + DUMMY),
        ("auto_values", params(lr="auto", betas="auto", eps="auto"), IMPORT + trainer()),
        ("untested_optimizer", zero(), None),
        ("untested_optimizer", zero(optimizer={"type": "SGD"}, more=UNTESTED), None),
        ("master_weights", zero(more={"bf16": {"enabled": True, "bf16_master_weights_and_grads": True,
                                               "bf16_optimizer_states": True}}), None),
        ("fsdp1", "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n", CLIENT),
        ("registered_in_time", zero(), IMPORT + DUMMY),
        ("registered_in_time", zero(), "from novoscale.integrations import deepspeed as _\n" + DUMMY),
        ("registered_in_time", zero(optimizer=adamw()), DUMMY),
        ("replaced", zero(), IMPORT + DUMMY),
        ("replaced", zero(optimizer=None, more=KEPT, **OFFLOAD), CLIENT),
        ("trainer_matches", params(lr=0.01), IMPORT + trainer(MATCHING)),
        ("one_process_on_cpu", "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"
         "mpirun_config: {mpirun_hostfile: hosts}\n", None),
    ],
)  # fmt: skip
def test_a_rule_is_silent_where_all_is_well(tmp_path, rule, config, script):
    assert [f for f in look(tmp_path, config, script).findings if f.rule == rule] == []


def test_the_worst_comes_first_and_each_is_one_line(tmp_path):
    config = zero(
        optimizer={"type": "novograd", "params": {"torch_adam": True}}, more={"gradient_cliping": 1}
    )
    found = look(tmp_path, config)
    order = [f.severity for f in found.findings]
    assert order == sorted(order, key=("wrong", "warning", "note").index)
    assert set(order) == {"wrong", "warning", "note"}
    assert all("\n" not in str(f) and str(f).startswith(f.where) for f in found.findings)


def test_every_rule_names_its_source():
    assert [rule.__name__ for rule in RULES if "Source: " not in rule.__doc__] == ["not_checked"]


def test_keys_of_batches_are_multiplied(tmp_path):
    config = zero(more={"train_batch_size": 6, "gradient_accumulation_steps": 2})
    assert look(tmp_path, config, ranks=3).passed
    (finding,) = [f for f in look(tmp_path, config, ranks=2).findings if f.severity == "wrong"]
    assert str(finding) == "train_batch_size: is 6, and 1 * 2 * 2 ranks is 4; DeepSpeed stops"


def test_keys_beside_a_deepspeed_file_are_refused(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(zero(more={"fp16": {"enabled": True}})))
    section = f"deepspeed_config_file: {tmp_path / 'ds.json'}\n  zero_stage: 2"
    found = look(tmp_path, YAML.format("mixed_precision: bf16\n", section))
    wrong = {f.where: f.rule for f in found.findings if f.severity == "wrong"}
    assert wrong == {
        "deepspeed_config.zero_stage": "beside_a_deepspeed_file",
        "mixed_precision": "beside_a_deepspeed_file",
        "fp16.enabled": "precisions_agree",
    }


def test_the_path_of_the_deepspeed_file_is_of_the_launch(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(zero()))
    found = look(tmp_path, YAML.format("", "deepspeed_config_file: ds.json"))
    (finding,) = [f for f in found.findings if f.rule == "relative_to_the_launch"]
    assert finding.severity == "warning"
    assert finding.where == "deepspeed_config.deepspeed_config_file"


def test_comments_are_read_as_deepspeed_reads_them(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text("{\n  // a comment\n  " + json.dumps(zero())[1:])
    assert [f.severity for f in diagnose(path).findings if f.rule == "comments_in_json"] == ["warning"]
    (tmp_path / "train.py").write_text(IMPORT + DUMMY)
    found = diagnose(path, tmp_path / "train.py")
    assert [f.severity for f in found.findings if f.rule == "comments_in_json"] == ["wrong"]


# ---- examples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").iterdir()), ids=lambda path: path.name)
def test_the_configs_of_this_repository_are_sound(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = diagnose(path)
    assert found.passed, found.findings
    kinds = {
        "novograd": "novoscale.NovoGrad",
        "adamw": "torch.optim.AdamW",
        "adafactor": "torch.optim.Adafactor",
    }
    assert found.runs.optimizer == kinds[path.stem.rpartition("_")[2]]
    assert all(f.severity == "note" for f in found.findings)


def test_the_configs_in_the_wheel_of_deepspeed(tmp_path):
    """Templates of its autotuner: nothing is missing in them but the size of a batch."""
    templates = Path(pytest.importorskip("deepspeed").__file__).parent / "autotuning" / "config_templates"
    for path in sorted(templates.glob("*.json")):
        wrong = [f for f in diagnose(path).findings if f.severity == "wrong"]
        assert ["train_batch_size" in str(f) for f in wrong] == [True]
        found = look(tmp_path, {**json.loads(path.read_text()), "train_batch_size": 8})
        assert found.passed, found.findings


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MULTI_GPU", "NO"])
def test_the_configs_that_accelerate_writes(tmp_path, kind):
    accelerate = pytest.importorskip("accelerate.commands.config.config_args")
    config = accelerate.ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type=kind,
        mixed_precision="bf16",
        use_cpu=False,
        debug=False,
        num_processes=2,
        fsdp_config={"fsdp_version": 2} if kind == "FSDP" else None,
        deepspeed_config={"zero_stage": 3, "zero3_init_flag": True} if kind == "DEEPSPEED" else None,
    )
    config.to_yaml_file(str(tmp_path / "config.yaml"))
    found = diagnose(tmp_path / "config.yaml")
    assert found.passed, found.findings
    assert (found.config.deepspeed or {}).get("zero_optimization") == (
        {"stage": 3} if kind == "DEEPSPEED" else None
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.json", "", "is empty"),
        ("c.json", '{"zero_optimization": ', "not a DeepSpeed config in JSON"),
        ("c.json", "[1, 2]", "a DeepSpeed config is a JSON object, not a list"),
        ("c.json", "null", "not null"),
        ("c.json", "train: 1", "not a DeepSpeed config in JSON"),
        ("c.yaml", "", "is empty"),
        ("c.yaml", "a: [", "not an Accelerate config in YAML"),
        ("c.yaml", "- 1\n", "it has no distributed_type"),
        ("c.yaml", "num_processes: 2\n", "it has no distributed_type"),
        (
            "c.yaml",
            "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: no.json\n",
            "no.json does not exist",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        diagnose(tmp_path / name)
    assert said in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_a_folder_a_missing_file_and_a_file_that_is_no_text_are_named(tmp_path):
    with pytest.raises(ConfigError, match="a folder; name a file"):
        diagnose(tmp_path)
    with pytest.raises(ConfigError, match="there is no such file"):
        diagnose(tmp_path / "no.json")
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        diagnose(tmp_path / "c.json")
    (tmp_path / "c.json").write_text(json.dumps(zero()))
    (tmp_path / "train.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match="not a Python script"):
        diagnose(tmp_path / "c.json", tmp_path / "train.py")


@pytest.mark.parametrize("value", [None, True, 0, -1, "", "auto", [], {}, [[]], 1e400])
@pytest.mark.parametrize(
    "key", [*BATCH, "optimizer", "zero_optimization", "fp16", "bf16", "data_types", "scheduler"]
)
def test_any_value_in_any_place_is_a_finding_and_no_traceback(tmp_path, key, value):
    found = [
        look(tmp_path, {**zero(), key: value}, IMPORT + trainer()),
        look(tmp_path, zero(**{"offload_optimizer": value}), IMPORT + DUMMY),
        look(tmp_path, zero(optimizer={"type": value, "params": value})),
        look(tmp_path, params(**{"betas": value, "preset": value, "granularity": value}), IMPORT + trainer()),
    ]
    assert all(isinstance(diagnosis, Diagnosis) for diagnosis in found)
