"""``novoscale doctor`` reads configs as they are in the wild, and says of a file what is wrong with it."""

import json
from pathlib import Path

import pytest
from doctor_cases import BATCH, DUMMY, IMPORT, look, params, trainer, zero

from novoscale.doctor import ConfigError, Diagnosis, diagnose

ROOT = Path(__file__).parent.parent.parent


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
