"""``novoscale doctor --write`` changes what has to be changed, and every other line stays as it was."""

import json

import pytest

from novoscale.doctor import ConfigError, diagnose
from novoscale.doctor.rewriting import put, rewrite

JSON = """{
    "train_batch_size": "auto",
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-5, "betas": [0.8, 0.999], "weight_decay": 0.1, "max_grad_norm": 0.5}
    },
    "zero_optimization": { "stage": 2, "overlap_comm":   true },
    "steps_per_print": 2e3
}
"""
NEW = """{
    "train_batch_size": "auto",
    "optimizer": {
        "type": "NovoGrad",
        "params": {
            "lr": 3e-05,
            "weight_decay": 0.1,
            "preset": "adamw",
            "momentum_dtype": "int8"
        }
    },
    "zero_optimization": { "stage": 2, "overlap_comm":   true },
    "steps_per_print": 2e3,
    "gradient_clipping": 0.5
}
"""


def rewritten(folder, name, text):
    (folder / name).write_text(text)
    target = folder / f"new{(folder / name).suffix}"
    made = rewrite(diagnose(folder / name).config, target)
    for path, content in made.files.items():
        path.write_text(content)
    return made, target


def test_of_a_json_only_the_optimizer_changes(tmp_path):
    made, target = rewritten(tmp_path, "ds.json", JSON)
    assert target.read_text() == NEW
    assert made.said == [
        "left out of optimizer.params, being the other optimizer's: betas",
        "optimizer.params.max_grad_norm is gradient_clipping now",
    ]
    assert diagnose(target).passed
    assert diagnose(target).runs.optimizer == "novoscale.NovoGrad"


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("{}", '{"k": 1}'),
        ('{"a": 2}', '{"a": 2, "k": 1}'),
        ('{"k": {"k": 3}, "a": "}"}', '{"k": 1, "a": "}"}'),
        ('{\n\t"a": "k"\n}', '{\n\t"a": "k",\n\t"k": 1\n}'),
        ('{"\\"k": 2, "k" : [1, {"x": 2}] }', '{"\\"k": 2, "k" : 1 }'),
    ],
)
def test_a_value_is_put_into_json_text(text, made):
    assert put(text, "k", 1) == made
    assert json.loads(made) == {**json.loads(text), "k": 1}


def test_values_that_the_script_gives_stay_with_it(tmp_path):
    config = {"train_batch_size": "auto", "zero_optimization": {"stage": 3}}
    _, target = rewritten(tmp_path, "ds.json", json.dumps(config))
    params = json.loads(target.read_text())["optimizer"]["params"]
    assert params == {"lr": "auto", "weight_decay": "auto", "preset": "adamw", "momentum_dtype": "int8"}


def test_of_a_yaml_one_line_changes_and_comments_stay(tmp_path):
    (tmp_path / "ds.json").write_text(JSON)
    text = (
        "# ours\ndistributed_type: DEEPSPEED\ndeepspeed_config:\n"
        f"  deepspeed_config_file: {tmp_path / 'ds.json'}  # relative\n  zero3_init_flag: false\n"
        "num_processes: 2\n"
    )
    _, target = rewritten(tmp_path, "config.yaml", text)
    assert target.read_text() == text.replace("ds.json", "new.json")
    assert (tmp_path / "new.json").read_text() == NEW
    assert diagnose(target).runs.optimizer == "novoscale.NovoGrad"


def test_a_yaml_without_a_file_gets_one(tmp_path):
    text = (
        "# ours\ndistributed_type: DEEPSPEED\nmixed_precision: bf16\ndeepspeed_config:\n"
        "  # how\n  zero_stage: 3\n  gradient_clipping: 0.5\n  zero3_init_flag: true  # big\n"
        "num_processes: 2\n"
    )
    _, target = rewritten(tmp_path, "config.yaml", text)
    assert target.read_text().splitlines() == [
        "# ours",
        "distributed_type: DEEPSPEED",
        "deepspeed_config:",
        "  # how",
        f"  deepspeed_config_file: {tmp_path / 'new.json'}",
        "  zero3_init_flag: true  # big",
        "num_processes: 2",
    ]
    made = json.loads((tmp_path / "new.json").read_text())
    assert made["zero_optimization"] == {"stage": 3}
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"] == {"enabled": True}
    assert diagnose(target).passed


def test_comments_of_a_json_are_lost_and_that_is_said(tmp_path):
    made, target = rewritten(tmp_path, "ds.json", "{\n// ours\n" + JSON[1:])
    assert "comments are lost, as JSON has none" in made.said
    assert json.loads(target.read_text())["steps_per_print"] == 2000


def test_nothing_is_overwritten_and_what_has_no_optimizer_is_named(tmp_path):
    (tmp_path / "ds.json").write_text(JSON)
    with pytest.raises(ConfigError, match="is there already; name a new file"):
        rewrite(diagnose(tmp_path / "ds.json").config, tmp_path / "ds.json")
    (tmp_path / "c.yaml").write_text("distributed_type: FSDP\n")
    with pytest.raises(ConfigError, match="the optimizer is made in the script"):
        rewrite(diagnose(tmp_path / "c.yaml").config, tmp_path / "new.yaml")
    (tmp_path / "c.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}\n")
    with pytest.raises(ConfigError, match="as a block"):
        rewrite(diagnose(tmp_path / "c.yaml").config, tmp_path / "new.yaml")
    with pytest.raises(ConfigError, match=r"name a \.yaml file"):
        rewrite(diagnose(tmp_path / "c.yaml").config, tmp_path / "new.json")
