"""The real command line: settings, files, errors, and what a run leaves behind.

Most commands run in this process through ``cli.run``, the function behind ``prompt-lab``; what
depends on a fresh process (help without torch, ``python -m``, test from files) has one.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS
from lightning.pytorch.callbacks import Timer

from prompt_lab.__main__ import COMMANDS, TRAINER_COMMANDS, main, make_parser
from prompt_lab.commands import fit as cli
from prompt_lab.commands.fit import ParseOnly
from prompt_lab.commands.sweep import Trial, make_trials, read_sweep
from prompt_lab.files.prompts import load_prompt
from prompt_lab.files.results import read_csv

pytestmark = pytest.mark.usefixtures("own_folder")

SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
SHIPPED = sorted(set(CONFIGS.rglob("*.yaml")) - set(SWEEPS))
TUNING = [CONFIGS / "prompt_tuning" / f"{name}.yaml" for name in ("t5-base", "smollm2")]

Command = Callable[..., int]


@pytest.fixture(scope="session")
def tiny_file(
    model_folder: Callable[[str], Path],
    fewshot_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """The config of a small fit: one GPT-2 prompt, two steps, an evaluation after each."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    model = {"backbone": {"name": str(model_folder("gpt2"))}, "num_virtual_tokens": 4}
    model |= {"learning_rate": 0.05, "batch_size": 4}
    trainer = {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 1, "logger": False}
    content = {
        "model": {"class_path": "PromptTuning", "init_args": model},
        "data": {"root": str(fewshot_root), "tasks": ["glue-sst2"], "samples": [13]},
        "trainer": trainer,
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def fit(tiny_file: str) -> Command:
    """Function that runs ``fit`` on the small settings with more words."""
    return lambda *words: cli.run(["fit", "-c", tiny_file, *words])


def shell(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m prompt_lab`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "prompt_lab", *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def only_prompt(folder: Path) -> torch.Tensor:
    (path,) = (folder / "prompts").glob("*.safetensors")
    return load_prompt(path).prompt


def status(command: Command, *words: str) -> int:
    """Exit status of a command, also where the parser exits."""
    try:
        return command(*words)
    except SystemExit as leaving:
        return int(leaving.code or 0)


# ---- the entry -----------------------------------------------------------------------------------


def test_help_comes_within_two_seconds_and_without_torch():
    code = (
        "import sys; sys.argv = ['prompt-lab', '--help']; from prompt_lab.__main__ import main; "
        "main(); print(sorted({'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert time.monotonic() - started < 2
    assert done.stdout.splitlines()[-1] == "[]"
    for word in ("fit", "validate", "test", "--config", "configs/quickstart.yaml"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["tets"], "no command 'tets'; did you mean test?"),
        (["x"], "no command 'x'; commands: fit, validate, test"),
        (["tasks", "chek", "data"], "no command 'tasks chek'; did you mean tasks check?"),
    ],
)
def test_an_unknown_command_gets_the_nearest_one(words, answer, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prompt-lab: {answer}")


@pytest.mark.parametrize("words", [["vectors"], ["tasks", "-h"], ["vectors", "--help"]])
def test_a_group_lists_its_commands(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: prompt-lab {words[0]} COMMAND")
    assert all(line.split()[0] == words[0] for line in out.splitlines()[2:])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_sentence_for_every_flag_and_no_word_of_the_inside(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: prompt-lab {command} ")
    for word in ("``", ":class:", "__main__", "prompt_lab.commands", "NoneType"):
        assert word not in out
    if command not in TRAINER_COMMANDS:
        assert all(len(action.help.split()) > 1 for action in make_parser(command)._actions)


# ---- settings ------------------------------------------------------------------------------------


def printed_config(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert status(lambda *w: cli.run(["fit", *w]), *words, "--print_config") == 0
    return capsys.readouterr().out


def test_a_printed_config_parses_back_to_itself(tiny_file, capsys):
    words = ("--model.patience=3", "--model.init.name=normal", "--data.max_input_length=9")
    first = printed_config(capsys, "-c", tiny_file, *words)
    Path("printed.yaml").write_text(first)
    assert yaml.safe_load(first)["model"]["init_args"]["patience"] == 3
    assert printed_config(capsys, "-c", "printed.yaml") == first


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_config_is_parsed(path):
    config = ParseOnly(["fit", "-c", str(path)]).config.fit
    assert config.model.class_path.startswith("prompt_lab.")
    for name, value in yaml.safe_load(path.read_text())["model"]["init_args"].items():
        if not isinstance(value, dict):
            assert config.model.init_args[name] == value


def shipped_trials(path: Path, folder: Path) -> list[Trial]:
    """The trials of a grid; five of a search, drawn at random as a Bayesian search begins."""
    content = yaml.safe_load(path.read_text())
    if content["method"] == "bayes":
        with pytest.raises(ValueError, match="method bayes needs the service"):
            read_sweep(path)
        path = folder / path.name
        path.write_text(yaml.safe_dump(content | {"method": "random"}))
    return make_trials(read_sweep(path), run_cap=None if content["method"] == "grid" else 5)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_trials_of_a_shipped_sweep_are_parsed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    content = yaml.safe_load(path.read_text())
    trials = shipped_trials(path, tmp_path)
    assert len(trials) > 1
    if content["method"] != "grid" or "metric" in content:  # a metric that wandb gets in time
        assert content["metric"] == {"name": "best/val_score", "goal": "maximize"}
        config = ParseOnly(list(trials[0].words[1:])).config.fit
        assert config.trainer.logger.class_path.endswith("WandbLogger")
        evaluations = config.trainer.max_steps // config.trainer.val_check_interval
        assert content.get("early_terminate", {}).get("min_iter", 1) < evaluations
    for trial in trials[:: max(1, len(trials) // 4)]:
        assert trial.words[0] == "prompt-lab"
        parsed = ParseOnly([*trial.words[1:], f"--run_dir={tmp_path}"]).config
        config = parsed[parsed.subcommand]
        assert parsed.subcommand == "test" or config.test_after_fit
        for name, value in trial.settings.items():
            section, *settings = name.split(".")
            found = config[section].get("init_args", config[section])
            for setting in settings:
                found = found[setting]
            if isinstance(value, dict):  # the rest of the mapping has its defaults
                found = {key: found[key] for key in value}
            assert found == value


@pytest.mark.parametrize("path", TUNING, ids=lambda path: path.stem)
def test_every_prompt_tuning_config_runs_on_a_tiny_model(path, model_folder, fewshot_root):
    """Reference: a model of the same architecture, with the config's other settings as they are.

    Its tokenizer has a chat template, which one of the configs asks for.
    """
    name = yaml.safe_load(path.read_text())["model"]["init_args"]["backbone"]["name"].lower()
    architectures = {"t5": "t5", "bart": "bart", "stories260k": "llama", "smollm2": "llama"}
    kind = next(kind for word, kind in architectures.items() if word in name)
    folder = shutil.copytree(model_folder(kind), "model")
    chat = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    Path(folder, "chat_template.jinja").write_text(chat)
    words = [
        *("fit", f"--config={path}", f"--model.backbone.name={folder}"),
        *(
            "--model.num_virtual_tokens=5",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=1",
        ),
        *(f"--data.root={fewshot_root}", "--data.tasks=[glue-sst2]", "--data.samples=[13]"),
        *("--model.max_new_tokens=8", "--trainer.accelerator=cpu", "--run_dir=r"),
    ]
    assert cli.run(words) == 0
    rows = [row for row in read_csv(Path("r/results.csv")) if row["variant"] == "tuned"]
    assert len(rows) == len(list(Path("r/prompts").glob("*.safetensors"))) > 0
    assert {row["status"] for row in rows} == {"finished"}


# ---- what a run leaves ---------------------------------------------------------------------------


def test_a_saved_config_reruns_to_the_same_prompt_and_serves_test_in_a_fresh_process(
    fit, tiny_file
):
    """Reference: ``--test_after_fit``, which tests in the process of the fit."""
    assert fit("--run_dir=first", "--test_after_fit", "--model.test_baselines=true") == 0
    config = "first/config-fit.yaml"
    saved = yaml.safe_load(Path(config).read_text())
    assert not {"run_dir", "ckpt_path", "dry_run", "resume", "overwrite"} & set(saved)
    assert cli.run(["fit", "-c", config, "--run_dir=second", "--test_after_fit=false"]) == 0
    assert only_prompt(Path("first")).equal(only_prompt(Path("second")))
    assert not Path("second/results.csv").exists()

    done = shell("test", "-c", config, "--run_dir", "second")
    assert done.returncode == 0, done.stderr
    assert "test scores" in done.stderr + done.stdout
    assert "glue-sst2  ACC" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    first, second = (
        [{**row, "seconds": ""} for row in read_csv(Path(name))]
        for name in ("first/results.csv", "second/results.csv")
    )
    assert first == second
    for name in ("predictions.jsonl", "digests.json"):
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes()


def in_a_terminal(*words: str, columns: int) -> list[str]:
    """What a terminal of so many columns shows of a command, without colours and moves."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-m", "prompt_lab", *words]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=side, stderr=side) as process:
        os.close(side)
        shown = b""
        with suppress(OSError):  # the end of a terminal whose process is gone
            while part := os.read(main, 65536):
                shown += part
    os.close(main)
    assert process.returncode == 0, shown.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")
    return [line.rpartition("\r")[2] for line in text.splitlines()]


def test_a_terminal_of_80_columns_shows_a_bar_without_epochs_and_a_table_that_fits(tiny_file):
    """Lightning's own bar says epoch 0/-2, and its sentence of the end tears what stands above."""
    words = ("fit", "-c", tiny_file, "--run_dir=r", "--test_after_fit", "--trainer.logger=true")
    lines = in_a_terminal(*words, "--model.test_baselines=true", columns=80)
    text = "\n".join(lines)
    assert re.search(r"Training +━+ 2/2 .* loss: \d\.\d{3}", text)
    for word in ("Epoch", "stopped", "v_num"):
        assert word not in text
    start = lines.index("test scores")
    end = next(at for at, line in enumerate(lines) if line.startswith("results, predictions"))
    table = [line.rstrip() for line in lines[start + 1 : end] if line.strip()]
    assert all(len(line) <= 80 for line in lines[start:end])
    assert table[0].split()[:2] == ["task", "metric"]
    (rule,) = [at for at, line in enumerate(table) if set(line) == {"-", " "}]
    assert table[rule + 1].split()[:2] == ["glue-sst2", "ACC"]


def test_a_fit_calls_nothing_that_is_deprecated(fit, tmp_path, monkeypatch):
    """Lightning's own calls, which Python does not show, are not ours to change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "all")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert fit("--run_dir=r", "--test_after_fit") == 0
    kinds = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
    told = [(x.filename, str(x.message)) for x in said if issubclass(x.category, kinds)]
    assert [words for file, words in told if "prompt_lab" in file] == []
    assert [words for _, words in told if "transformers" in words or "past_key" in words] == []


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the lock."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_second_fit_in_the_same_folder_is_refused(fit, two_steps, capsys):
    shutil.copytree(two_steps, "r")
    for words in ([], [f"--ckpt_path={two_steps}/checkpoints/last.ckpt"]):  # of another folder
        assert fit("--run_dir=r", "--model.learning_rate=0.02", *words) == 1
        told = "r holds an earlier fit: --resume to go on with it, --overwrite to delete it"
        assert f"prompt-lab: {told}, or give another --run_dir\n" in capsys.readouterr().err
        assert contents(Path("r")) == contents(two_steps)


def test_overwrite_leaves_what_a_fit_in_a_new_folder_leaves_and_what_is_not_of_a_fit(fit):
    """Reference: the same fit in a new folder."""
    assert fit("--run_dir=r", "--test_after_fit", "--model.save_steps=[1]") == 0
    Path("r/mine.safetensors").write_text("mine")
    assert fit("--run_dir=r", "--model.learning_rate=0.02", "--overwrite") == 0
    assert fit("--run_dir=new", "--model.learning_rate=0.02", "--overwrite") == 0
    kept, new = contents(Path("r")), contents(Path("new"))
    assert kept.pop("mine.safetensors") == b"mine"
    assert kept.keys() == new.keys()
    for name in ("curves.csv", "config-fit.yaml", "fit.json"):
        assert kept[name] == new[name]
    assert only_prompt(Path("r")).equal(only_prompt(Path("new")))


def test_a_dry_run_prints_the_grid_and_writes_nothing(fit, capsys):
    words = ("--model.learning_rate=[0.1, 0.2, 0.3]", "--data.samples=[13, 42]", "--dry_run")
    assert status(fit, *words, "--run_dir=r", "--trainer.devices=2", "--model.batch_size=4") == 0
    assert "processes: 2, whole runs shared, 3 of them" in capsys.readouterr().out
    assert status(fit, *words, "--run_dir=r") == 0
    out = capsys.readouterr().out
    assert out.startswith("6 runs of 4 virtual tokens\n")
    assert "  sample: 13, 42\n  init_seed: 0\n  learning_rate: 0.1, 0.2, 0.3\n" in out
    assert "first step: 24 rows" in out
    assert re.search(r"^time: [\d.]+ minutes of steps, [\d.]+ s each by", out, re.MULTILINE)
    assert not list(Path().iterdir())


def test_there_is_one_line_per_evaluation_and_none_per_step(fit, capfd):
    assert fit("--trainer.max_steps=6", "--trainer.val_check_interval=2", "--run_dir=r") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "1 runs of 4 virtual tokens on 1 x cpu, 6 steps, in r"
    assert [line.split()[:2] for line in lines[1:-1]] == [["step", f"{n}/6"] for n in (2, 4, 6)]
    assert lines[-1].startswith("trained 1 run in ")


# ---- resume --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(tiny_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the small fit; copy it before changing it."""
    folder = tmp_path_factory.mktemp("fit") / "run"
    assert cli.run(["fit", "-c", tiny_file, f"--run_dir={folder}"]) == 0
    return folder


def test_flags_win_over_a_checkpoint_and_the_difference_is_told(fit, two_steps, capsys):
    """Reference: the same without the flag."""
    last = f"--ckpt_path={two_steps}/checkpoints/last.ckpt"
    words = ("--trainer.max_steps=4", last)
    assert fit("--run_dir=plain", *words) == 0
    assert "other settings" not in capsys.readouterr().err
    assert fit("--run_dir=smooth", *words, "--model.label_smoothing=0.5") == 0
    told = "the checkpoint had other settings: label_smoothing 0.0 -> 0.5\n"
    assert told in capsys.readouterr().err
    states = [
        torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True)
        for name in ("plain", "smooth")
    ]
    assert [state["global_step"] for state in states] == [4, 4]
    assert not states[0]["state_dict"]["prompt"].equal(states[1]["state_dict"]["prompt"])
    assert states[1]["hyper_parameters"]["label_smoothing"] == 0.5


@pytest.mark.parametrize("words", [["--resume"], ["--ckpt_path=longer/checkpoints/last.ckpt"]])
def test_a_finished_fit_can_be_continued_with_a_larger_budget(fit, two_steps, words):
    """Reference: a fit that had the larger budget from the start."""
    shutil.copytree(two_steps, "longer")
    Path("longer/results.csv").touch()  # of the two steps
    assert fit("--run_dir=longer", "--trainer.max_steps=4", *words) == 0
    assert fit("--run_dir=whole", "--trainer.max_steps=4") == 0
    rows, wanted = (read_csv(Path(name, "curves.csv")) for name in ("longer", "whole"))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [{**row, "status": ""} for row in rows] == [{**row, "status": ""} for row in wanted]
    assert only_prompt(Path("longer")).equal(only_prompt(Path("whole")))
    longer, whole = contents(Path("longer")), contents(Path("whole"))
    assert longer.keys() == whole.keys()
    for name in ("config-fit.yaml", "fit.json"):
        assert longer[name] == whole[name]


def test_a_larger_budget_that_is_interrupted_is_not_taken_for_finished(
    fit, two_steps, monkeypatch, capsys
):
    shutil.copytree(two_steps, "r")
    longer = ("--run_dir=r", "--trainer.max_steps=4", "--resume")
    method = cli.METHODS["PromptTuning"]
    with monkeypatch.context() as patch:
        patch.setattr(method, "on_train_batch_start", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(*longer)
    assert fit(*longer) == 0
    assert "is finished" not in capsys.readouterr().out
    assert read_csv(Path("r/curves.csv"))[-1]["step"] == "4"


def test_a_fit_that_its_time_limit_ended_is_resumed(fit, two_steps, capsys, monkeypatch):
    """Reference: the fit without a limit."""
    with monkeypatch.context() as patch:
        patch.setattr(Timer, "time_elapsed", lambda *_: 99 * Path("r/curves.csv").is_file())
        assert fit("--run_dir=r", "--trainer.max_time=00:00:00:09") == 0
    assert Path("r/fit.json").is_file()
    assert read_csv(Path("r/curves.csv"))[-1]["step"] == "1"
    assert fit("--run_dir=r", "--resume") == 0
    assert "is finished" not in capsys.readouterr().out
    assert only_prompt(Path("r")).equal(only_prompt(two_steps))
    steps = [row["step"] for row in read_csv(Path("r/curves.csv"))]
    assert steps == ["1", "2"]


def test_resume_of_a_finished_fit_says_so_and_changes_nothing(fit, two_steps, capsys):
    for name in ("r", "bare"):
        shutil.copytree(two_steps, name)
    shutil.rmtree("bare/checkpoints")
    for name in ("r", "bare"):
        before = contents(Path(name))
        for word in ("--resume", "--resume=true"):
            assert fit(f"--run_dir={name}", word) == 0
            said = f"the fit in {name} is finished: nothing is left to train\n"
            assert capsys.readouterr().out == said
        assert contents(Path(name)) == before


@pytest.mark.parametrize("checkpoint", [True, False])
def test_resume_makes_up_for_a_test_that_was_interrupted(fit, two_steps, capsys, checkpoint):
    """Reference: the test of the fit that nothing interrupted."""
    assert fit("--run_dir=whole", "--test_after_fit") == 0
    shutil.copytree(two_steps, "r")
    if not checkpoint:
        shutil.rmtree("r/checkpoints")
    shutil.copy("whole/digests.json", "r")  # results.csv is written last
    capsys.readouterr()
    assert fit("--run_dir=r", "--test_after_fit", "--resume") == 0
    out = capsys.readouterr().out
    assert "nothing is left to train" in out
    assert "test scores" in out
    assert "step " not in out
    for name in ("predictions.jsonl", "digests.json"):
        assert Path("r", name).read_bytes() == Path("whole", name).read_bytes()
    rows, wanted = (
        [{**row, "seconds": ""} for row in read_csv(Path(folder, "results.csv"))]
        for folder in ("r", "whole")
    )
    assert rows == wanted
    assert fit("--run_dir=r", "--test_after_fit", "--resume") == 0
    assert "test scores" not in capsys.readouterr().out


def test_resume_without_a_checkpoint_clears_what_is_left_and_starts_anew(fit, two_steps):
    """Reference: the fit that nothing interrupted, here for the first time and after an error."""
    shutil.copytree(two_steps, "r")
    shutil.rmtree("r/checkpoints")
    Path("r/fit.json").unlink()
    Path("r/curves.csv").write_text("torn")
    for name in ("r", "new"):
        assert fit(f"--run_dir={name}", "--resume") == 0
        assert contents(Path(name)).keys() == contents(two_steps).keys()
        assert Path(name, "curves.csv").read_bytes() == (two_steps / "curves.csv").read_bytes()
        assert only_prompt(Path(name)).equal(only_prompt(two_steps))


@pytest.mark.parametrize(
    ("words", "differs"),
    [
        (["--model.num_virtual_tokens=7"], "model.num_virtual_tokens 4 there, 7 here"),
        (["--data.samples=[42]"], "data.samples [13] there, [42] here"),
        (["--trainer.max_steps=1"], "trainer.max_steps 2 there, 1 here"),
        (["--seed_everything=3"], "seed_everything 0 there, 3 here"),
        (
            ["--model.optim.clip=1", "--trainer.precision=bf16-mixed", "--trainer.max_steps=4"],
            "model.optim.clip None there, 1.0 here; trainer.precision None there, 'bf16-mixed' "
            "here",
        ),
    ],
)
def test_resume_refuses_other_settings_and_names_them(fit, two_steps, capsys, words, differs):
    shutil.copytree(two_steps, "r")
    assert fit("--run_dir=r", "--resume", *words) == 1
    told = f"prompt-lab: --resume: the fit in r has other settings: {differs}; give those of the"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
    assert contents(Path("r")) == contents(two_steps)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.num_virtual_tokens=7"], "prompt has shape (1, 4, 32) there and (1, 7, 32) here"),
        (["--data.samples=[42]"], "(glue-sst2 13 seed 0), the settings give 1 (glue-sst2 42"),
        (["--data.samples=[13, 42]"], "the checkpoint is of runs 1 (glue-sst2 13 seed 0), the"),
    ],
)
def test_a_checkpoint_of_other_prompts_is_refused(fit, two_steps, capsys, words, sentence):
    last = f"--ckpt_path={two_steps}/checkpoints/last.ckpt"
    assert fit("--run_dir=r", "--trainer.max_steps=4", last, *words) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("prompt-lab: the checkpoint ")
    assert sentence in told


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.tasks=[glue-sst]"], "unknown task 'glue-sst': did you mean glue-sst2"),
        (["--model.learning_rat=3"], "; did you mean --learning_rate?"),
        (["--model.optim.nme=adamw"], "did you mean --optim.name?"),
        (["--trainer.max_stepz=3"], "did you mean --trainer.max_steps?"),
        (["--model=PromtTuning"], "did you mean PromptTuning?"),
        (["--model.optim.name=lion"], "'adamw', 'adafactor'"),
        (["--model.backbone.name=nowhere"], "no backbone 'nowhere'"),
        (["--data.root=nowhere"], "no folder nowhere: the data root does not exist"),
        (["--data.samples=[77]"], "the samples in"),
        (["--trainer.max_steps=-1"], "the fit has no end: give trainer.max_steps"),
        (["--trainer.precision=bf16-true"], "model.backbone.dtype bfloat16"),
        (["--trainer.gradient_clip_val=1"], "use model.optim.clip"),
        (["--trainer.default_root_dir=x"], "use --run_dir instead"),
        (["--ckpt_path=last"], "no checkpoint last: leave --ckpt_path out to start anew"),
        (["--model.init.name=file"], "give a prompt file, a prompt store, "),
        (["--model.num_virtual_tokens=0"], "model.num_virtual_tokens is 0: give at least 1"),
        (["--data.samples=[13, 13]"], "data.samples must be distinct"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_answered_with_one_sentence(fit, capsys, words, sentence):
    assert status(fit, "--run_dir=r", *words) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prompt-lab: ")
    assert sentence in line
    assert not Path("r", "curves.csv").exists()


@pytest.mark.parametrize("word", ["--run_dir=", "--overwrite", "--ckpt_path=x.ckpt"])
def test_resume_needs_a_folder_and_nothing_else(fit, capsys, word):
    words = ["--resume"] if word == "--run_dir=" else ["--resume", "--run_dir=r", word]
    assert fit(*words) == 1
    assert "--resume goes on with the fit in --run_dir: give that" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["test", "validate"])
def test_test_and_validate_need_the_folder_of_a_fit(tiny_file, two_steps, capsys, command):
    assert cli.run([command, "-c", tiny_file]) == 1
    assert f"{command} needs --run_dir, the folder of the fit" in capsys.readouterr().err
    assert cli.run([command, "-c", tiny_file, "--run_dir=none"]) == 1
    assert "1 of 1 prompts are not in none/prompts: glue-sst2_13" in capsys.readouterr().err
    shutil.copytree(two_steps, "r")
    longer = [command, "-c", tiny_file, "--run_dir=r", "--model.num_virtual_tokens=7"]
    assert cli.run(longer) == 1
    assert "has shape (4, 32), the config asks for (7, 32)" in capsys.readouterr().err


# ---- own tasks, wandb ----------------------------------------------------------------------------


@pytest.fixture
def own_task() -> tuple[str, ...]:
    """Words that name a user's task: a folder of files for five samples, and a row of YAML."""
    folder = Path("mine/weather")
    folder.mkdir(parents=True)
    for sample in (100, 13, 21, 42, 87):
        for split in ("train", "dev", "test"):
            rows = [f"{split} {sample} day {n}\t{'wet' if n % 2 else 'dry'}\n" for n in range(6)]
            (folder / f"weather_3_{sample}_{split}.tsv").write_text("".join(rows))
    Path("tasks.yaml").write_text("weather: {metric: ACC, labels: [wet, dry]}\n")
    return ("--data.task_file=tasks.yaml", "--data.root=mine", "--data.tasks=[weather]")


def test_a_task_of_the_user_trains_and_tests(fit, own_task):
    assert fit(*own_task, "--data.samples=[42]", "--run_dir=r", "--test_after_fit") == 0
    (row,) = read_csv(Path("r/results.csv"))
    assert (row["task"], row["ontology"], row["metric"]) == ("weather", "custom", "ACC")
    assert row["test_rows"] == "6"
    assert 0 <= float(row["test"]) <= 1


def test_wandb_gets_the_config_under_the_names_of_the_flags(fit, monkeypatch):
    """Reference: the settings given; wandb runs offline and sends nothing."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        assert fit("--trainer.logger=WandbLogger", "--run_dir=r", "--model.optim.clip=2") == 0
        config, summary = dict(wandb.run.config), dict(wandb.run.summary)
        assert Path(wandb.run.dir).is_relative_to("r")
    finally:
        wandb.finish()
    assert config["model"] == "PromptTuning"
    assert config["model.learning_rate"] == 0.05
    assert config["model.optim.clip"] == 2
    assert config["data.tasks"] == ["glue-sst2"]
    assert config["trainer.max_steps"] == 2
    assert config["seed_everything"] == 0
    best = max(float(row["dev"]) for row in read_csv(Path("r/curves.csv")))
    assert summary["best/val_score"] == pytest.approx(best)
    assert "curves" in summary


def test_nothing_is_deleted_where_no_fit_ever_was(fit, capsys):
    Path("mine/prompts").mkdir(parents=True)
    Path("mine/prompts/own.safetensors").write_bytes(b"mine")
    for flag in ("--overwrite", "--resume"):
        assert fit("--run_dir=mine", flag) == 1
        assert "mine holds prompts and no fit of prompt-lab, so" in capsys.readouterr().err
    assert Path("mine/prompts/own.safetensors").read_bytes() == b"mine"
