"""Settings of the trainer's commands: null in all ways to give it, and a class that is replaced."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from prompt_lab.commands import fit as cli
from prompt_lab.commands.fit import ParseOnly
from prompt_lab.commands.sweep_trials import make_trials, read_sweep
from prompt_lab.data.datamodule import CrossFitDataModule

SET = {
    "model": {
        "class_path": "PromptTuning",
        "init_args": {
            "optim": {"name": "adafactor", "clip": 2.0},
            "init": {"path": "somewhere", "text": "some", "vocab_size": 7, "source_tasks": ["a"]},
            "subspace": {"path": "map", "intrinsic_dim": 3},
            "patience": 3,
            "max_new_tokens": 9,
        },
    },
    "trainer": {"max_time": "00:01:00:00", "check_val_every_n_epoch": 2},
    "run_dir": "somewhere",
}
"""Nullable settings of every type, with values."""

NULLABLE = (
    "model.optim.clip",
    "model.init.path",
    "model.init.text",
    "model.init.vocab_size",
    "model.init.source_tasks",
    "model.subspace",
    "model.patience",
    "model.max_new_tokens",
    "trainer.max_time",
    "trainer.check_val_every_n_epoch",
    "run_dir",
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cli.RUN_DIR_VARIABLE, "")  # so that what a fit sets is taken back
    monkeypatch.delenv(cli.RUN_DIR_VARIABLE)
    Path("set.yaml").write_text(yaml.safe_dump(SET))


def nested(name: str, value: Any) -> dict[str, Any]:
    """A config with one setting."""
    keys = name.replace("model.", "model.init_args.").split(".")
    for key in reversed(keys):
        value = {key: value}
    return value


def parsed(*words: str) -> Any:
    """The settings of a fit."""
    given = [] if any(word.startswith("--data.tasks") for word in words) else ["--data.tasks=[a]"]
    return ParseOnly(["fit", *given, *words]).config.fit


def found(config: Any, name: str) -> Any:
    """The value of a setting by the name of its flag."""
    return config[name.replace("model.", "model.init_args.", 1)]


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of words that are refused; one line."""
    with pytest.raises(SystemExit) as leaving:
        parsed(*words)
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- null ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [[], ["-c", "set.yaml"]], ids=["defaults", "file"])
@pytest.mark.parametrize(
    "way", ["{}=null", "{} null", "{}=None", "{}=~", "{}=NULL", "yaml", "None"]
)
def test_null_replaces_a_value_in_every_way_to_give_it(way, base):
    """``None`` is what a wandb agent makes of null."""
    words = []
    for name in NULLABLE:
        if way in ("yaml", "None"):
            text = yaml.safe_dump(nested(name, None))
            Path(f"{name}.yaml").write_text(text.replace("null", "None") if way == "None" else text)
            words += ["-c", f"{name}.yaml"]
        else:
            words += f"--{way.format(name)}".split()
    config = parsed(*base, *words)
    assert [name for name in NULLABLE if found(config, name) is not None] == []


def nullable(kind: Any, prefix: str) -> list[str]:
    """The names of all settings of a class that may be null, also in dataclasses."""
    names = []
    for name, hint in get_type_hints(kind.__init__).items():
        if type(None) in get_args(hint):
            names.append(f"{prefix}.{name}")
        elif is_dataclass(hint):
            names += nullable(hint, f"{prefix}.{name}")
    return names


@pytest.mark.parametrize("method", ["PromptTuning", "MetaPrompt", "FineTuning"])
def test_every_nullable_setting_takes_null(method):
    names = nullable(cli.METHODS[method], "model")
    names += nullable(CrossFitDataModule, "data") + nullable(Trainer, "trainer")
    assert len(names) > 30
    config = parsed(f"--model={method}", *(f"--{name}=null" for name in names))
    assert [name for name in names if found(config, name) is not None] == []


@pytest.mark.parametrize(
    "name",
    [
        "model.init_seed",
        "model.optim",
        "model.optim.betas",
        "model.optim.name",
        "model.backbone.name",
        "model.save_steps",
        "model.decoding",
        "data.tasks",
        "data.root",
        "data.max_input_length",
        "trainer.max_steps",
        "trainer.accelerator",
        "seed_everything",
        "dry_run",
        "model",
        "trainer",
    ],
)
@pytest.mark.parametrize("way", ["null", "yaml"])
def test_null_is_refused_by_what_cannot_be_null(name, way, capsys):
    Path("null.yaml").write_text(yaml.safe_dump(nested(name, None)))
    said = refusal(capsys, *(["-c", "null.yaml"] if way == "yaml" else [f"--{name}=null"]))
    assert said.startswith("prompt-lab: ")
    assert name.removeprefix("model.") in said
    assert "null" in said or "None" in said


@pytest.mark.parametrize(
    "words",
    [
        "--data.tasks=[boolq,null]",
        "--model.init_seed=[null]",
        "--model.init.source_tasks=[null]",
        "--model.learning_rate=[0.1,null]",
        "--model.optim={betas: null}",
    ],
)
def test_a_null_within_a_value_is_refused(words, capsys):
    name = words.split("=")[0].removeprefix("--").removeprefix("model.")
    assert f"{name}" in refusal(capsys, words)


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("--model.optim={'clip': None, 'name': 'sgd'}", "model.optim.clip", None),  # a wandb agent
        ("--model={init_args: {optim: {clip: null}}}", "model.optim.clip", None),
        ("--model.init.source_tasks=['None']", "model.init.source_tasks", ["None"]),
        ("--model.init.text=None of these", "model.init.text", "None of these"),
        ("--model.init.text=", "model.init.text", ""),
        ("--model.init.text=nullable", "model.init.text", "nullable"),
    ],
)  # fmt: skip
def test_only_the_word_itself_is_null(word, name, value):
    assert found(parsed(word), name) == value


def test_null_of_a_flag_reaches_method_file_and_checkpoint(model_folder, fewshot_root):
    model = {"backbone": {"name": str(model_folder("gpt2"))}, "num_virtual_tokens": 4}
    model |= {"optim": {"clip": 1.0}, "init": {"vocab_size": 9}, "patience": 3}
    trainer = {"accelerator": "cpu", "max_steps": 1, "val_check_interval": 1, "logger": False}
    data = {"root": str(fewshot_root), "tasks": ["glue-sst2"], "samples": [13]}
    settings = {"model": {"class_path": "PromptTuning", "init_args": model}}
    Path("tiny.yaml").write_text(yaml.safe_dump(settings | {"data": data, "trainer": trainer}))
    nulls = ("--model.optim.clip=null", "--model.init.vocab_size", "null", "--model.patience=None")
    assert cli.run(["fit", "-c", "tiny.yaml", "--run_dir=r", *nulls]) == 0
    text = Path("r/config-fit.yaml").read_text()
    assert "UNSET" not in text
    assert "None" not in text
    hparams = torch.load("r/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
    for kept in (yaml.safe_load(text)["model"]["init_args"], hparams):
        assert kept["optim"]["clip"] is kept["init"]["vocab_size"] is kept["patience"] is None
    again = parsed("-c", "r/config-fit.yaml")
    assert again.model.init_args.optim.clip is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"model.optim.clip": {"values": [None, 1.0]}},
        {"model.optim": {"parameters": {"clip": {"values": [None, 1.0]}}}},
        {"model": {"parameters": {"optim": {"parameters": {"clip": {"values": [None, 1.0]}}}}}},
        {"model.optim": {"values": [{"clip": None}, {"clip": 1.0}]}},
        {"model.optim.clip": {"values": ["null", 1.0]}},  # the advice of old
    ],
    ids=["flag", "nested", "nested twice", "mapping", "quoted"],
)
def test_null_in_a_sweep_is_null(parameters):
    command = ["prompt-lab", "fit", "-c", "set.yaml", "${args}"]
    content = {"method": "grid", "command": command, "parameters": parameters}
    Path("s.yaml").write_text(yaml.safe_dump(content))
    trials = make_trials(read_sweep(Path("s.yaml")))
    clips = [found(parsed(*trial.words[2:]), "model.optim.clip") for trial in trials]
    assert clips == [None, 1.0]


OVERRIDDEN = "--model.patience 4 stands before --config, which sets it to 9"


@pytest.mark.parametrize(
    ("before", "behind", "said"),
    [
        (
            ["--model.patience=4"],
            [],
            "--model.patience 4 stands before --config, which sets it to 9",
        ),
        (["--model.patience", "4"], ["--model.patience=4"], ""),
        (["--model.patience=9"], [], ""),
        (["--model.num_virtual_tokens=3"], [], ""),
        ([], ["--model.patience=4"], ""),
    ],
)
@pytest.mark.parametrize("config", [["-c", "a.yaml"], ["--config=a.yaml"]])
def test_a_flag_that_a_later_config_overrides_is_told(before, behind, said, config, capsys):
    Path("a.yaml").write_text("model: {class_path: PromptTuning, init_args: {patience: 9}}\n")
    settings = parsed(*before, *config, *behind)
    lines = [line for line in capsys.readouterr().err.splitlines() if "stands before" in line]
    assert lines == [f"prompt-lab: {said}: put --config first"] * bool(said)
    assert found(settings, "model.patience") == (4 if behind else 9)


# ---- a class instead of another ------------------------------------------------------------------

TUNING = {
    "num_virtual_tokens": 7,
    "patience": 3,
    "learning_rate": [1, 2],
    "optim": {"name": "adafactor", "betas": [0.8, 0.9]},
    "backbone": {"name": "some"},
}
SWITCHED = "prompt-lab: model is MetaPrompt instead of PromptTuning: dropped "
BACK = "prompt-lab: model is PromptTuning instead of MetaPrompt: dropped "
FULL = "prompt-lab: model is FineTuning instead of PromptTuning: dropped "


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model=MetaPrompt"], f"{SWITCHED}learning_rate, patience"),
        (["--model", "MetaPrompt"], f"{SWITCHED}learning_rate, patience"),
        (
            ["--model.class_path=prompt_lab.methods.meta_prompt.MetaPrompt"],
            f"{SWITCHED}learning_rate, patience",
        ),
        (["-c", "other.yaml"], f"{SWITCHED}learning_rate, patience"),
        (["--config=other.yaml"], f"{SWITCHED}learning_rate, patience"),
        (["--model=MetaPrompt", "--model.learning_rate=0.1"], f"{SWITCHED}patience"),
        (
            ["--model=MetaPrompt", "--model=PromptTuning"],
            f"{BACK}learning_rate, patience",
        ),
        (["--model.patience=4", "--model=FineTuning"], f"{FULL}num_virtual_tokens"),
        (["--model=PromptTuning"], ""),
        (
            ["--model.subspace.path=x", "--model.subspace=null", "--model=MetaPrompt"],
            f"{SWITCHED}learning_rate, patience, subspace",
        ),
        (["--model=prompt_lab.PromptTuning"], ""),
        (["-c", "same.yaml"], ""),
        ([], ""),
    ],
)
def test_settings_that_a_replaced_class_takes_along_are_told(words, said, capsys):
    tuning = {"class_path": "PromptTuning", "init_args": TUNING}
    Path("tuning.yaml").write_text(yaml.safe_dump({"model": tuning}))
    Path("other.yaml").write_text("model: {class_path: MetaPrompt}\n")
    Path("same.yaml").write_text(
        "model: {class_path: prompt_lab.PromptTuning, init_args: {patience: 9}}\n"
    )
    config = parsed("-c", "tuning.yaml", *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if "instead of" in line]
    assert lines == [said] * bool(said)
    assert found(config, "model.optim.name") == "adafactor"  # both classes have it
    assert found(config, "model.backbone.name") == "some"
