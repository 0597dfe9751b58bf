"""Each rule of ``novoscale doctor`` finds what it is for, names the key, and is silent about the rest."""

import json

import pytest
from doctor_cases import (
    ADAMW,
    BATCH,
    CLIENT,
    CLS,
    DUMMY,
    HANDED,
    IMPORT,
    KEPT,
    MATCHING,
    NOVOGRAD,
    OFFLOAD,
    PLAIN,
    UNTESTED,
    YAML,
    adamw,
    look,
    params,
    trainer,
    zero,
)

from novoscale.doctor import RULES, diagnose

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
        ("muon_preset", "wrong", "optimizer.params.preset", params(preset="muon"), None),
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


def test_no_refusal_of_deepspeed_hides_another():
    checker = pytest.importorskip("novoscale.doctor.deepspeed_config")
    config = {
        "train_batch_size": 2,
        "fp16": {"enabled": False, "zzz": 2},
        "amp": {"enabled": True},
        "zero_optimization": {"stage": 2, "bogus": 1, "offload_optimizer": {"device": "cpu", "more": 1}},
    }
    keys = {"amp", "fp16.zzz", "zero_optimization.bogus", "zero_optimization.offload_optimizer.more"}
    assert {key for key, _ in checker.refusals(config)} == keys
    assert config["amp"] == {"enabled": True}


@pytest.mark.parametrize(
    ("where", "config"),
    [
        ("optimizer.params.lr", zero(optimizer={"type": "AdamW", "params": {"weight_decay": 0.1}})),
        (
            "scheduler.params.warmup_type",
            zero(more={"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cosine"}}}),
        ),
    ],
)
def test_what_deepspeed_runs_instead_is_said(tmp_path, where, config):
    assert [f.where for f in look(tmp_path, config).findings if f.where == where] == [where]


@pytest.mark.parametrize(
    "config",
    [
        zero(optimizer={"type": "AdamW", "params": {"lr": "auto"}}),
        zero(
            optimizer={"type": "AdamW", "params": {}},
            more={
                "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_type": "linear"}}
            },
        ),
    ],
)
def test_a_rate_that_is_filled_in_or_scheduled_is_no_fault(tmp_path, config):
    where = {f.where for f in look(tmp_path, config).findings}
    assert not where & {"optimizer.params.lr", "scheduler.params.warmup_type"}
