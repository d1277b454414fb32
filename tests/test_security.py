"""What comes from strangers does not run code, reach a shell, or leave its folder.

Every payload makes a folder ``exploded`` in the current folder when it runs. What a config may name
is told in the docstring of ``prompt_lab.commands.fit``.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import prompt_lab
from prompt_lab.__main__ import main
from prompt_lab.commands import fit as cli
from prompt_lab.commands.sweep import sweep_command
from prompt_lab.files.prompts import Prompt, PromptStore, save_prompt

ROOT = Path(prompt_lab.__file__).parent
RUN_VARIABLES = (cli.RUN_DIR_VARIABLE, "WANDB_RUN_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
SHELL = "$(mkdir exploded); `mkdir exploded` | mkdir exploded && mkdir exploded #'\"\n"
CODE = "import os\nos.makedirs('exploded', exist_ok=True)\n"

Words = Callable[..., list[str]]


class Bomb:
    """A pickle of it runs code when it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.fixture(autouse=True)
def nothing_explodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, and look for traces of a payload in the end."""
    monkeypatch.chdir(tmp_path)
    for name in RUN_VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a command sets is taken back
        monkeypatch.delenv(name)
    yield
    assert not Path("exploded").exists()


@pytest.fixture
def words(model_folder: Callable[[str], Path], fewshot_root: Path) -> Words:
    """Function that gives the words of a command of two steps."""

    def given(*more: str, command: str = "fit") -> list[str]:
        return [
            *(command, f"--model.backbone.name={model_folder('gpt2')}"),
            *("--model.num_virtual_tokens=4", "--model.learning_rate=0.05"),
            *("--model.batch_size=4", f"--data.root={fewshot_root}"),
            *("--data.tasks=[glue-sst2]", "--data.samples=[13]", "--trainer.accelerator=cpu"),
            *("--trainer.logger=false", "--trainer.max_steps=2"),
            *("--trainer.val_check_interval=2", "--run_dir=r", *more),
        ]

    return given


def status(call: Callable[[], int]) -> int:
    """Exit status of a command, also where the parser exits."""
    try:
        return call()
    except SystemExit as leaving:
        return int(leaving.code or 0)


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence of the command."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("prompt-lab: ")]
    return line


def test_the_payload_is_one():
    """Guards the tests below."""
    torch.save(Bomb(), "bomb.pt")
    torch.load("bomb.pt", weights_only=False)
    assert Path("exploded").is_dir()
    Path("exploded").rmdir()


# ---- pickles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        ["--ckpt_path=b.ckpt"],
        ["--ckpt_path=b.ckpt", "--weights_only=false"],
        ["--model.init.name=file", "--model.init.path=b.ckpt"],
    ],
)
def test_a_checkpoint_that_would_run_code_is_refused(
    words, monkeypatch, capsys, given, inside, forced
):
    """Also among what a real one holds, and where the environment asks torch to run it."""
    saved = {"state_dict": {}, "hyper_parameters": Bomb(), "pytorch-lightning_version": "2.6.6"}
    torch.save(saved if inside else Bomb(), "b.ckpt")
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert cli.run(words(*given)) == 1
    assert "b.ckpt: not a file of tensors and plain values" in error(capsys)


@pytest.mark.parametrize("command", ["test", "validate"])
def test_no_command_unpickles_a_checkpoint(words, capsys, command):
    torch.save(Bomb(), "b.ckpt")
    given = words("--ckpt_path=b.ckpt", "--weights_only=false", command=command)
    assert cli.run(given) == 1
    assert "b.ckpt: not a file of tensors" in error(capsys)


def test_a_checkpoint_that_is_exchanged_after_the_check_is_not_unpickled_either():
    torch.save(Bomb(), "b.ckpt")
    for asked in (None, False):
        with pytest.raises(Exception, match="Weights only load failed"):
            cli.AtomicCheckpoints().load_checkpoint("b.ckpt", weights_only=asked)


@pytest.mark.parametrize("name", ["b.ckpt", "b.pt", "b.bin", "b.npy", "b.safetensors"])
def test_nothing_that_is_exported_or_imported_is_unpickled(model_folder, capsys, name):
    import numpy as np

    if name == "b.npy":
        np.save(name, np.array([Bomb()], dtype=object), allow_pickle=True)
    else:
        torch.save({"prompt": Bomb()}, name)
    command = "export" if name == "b.ckpt" else "import"
    given = [command, name, "--out=o", f"--backbone={model_folder('gpt2')}"]
    assert main(given) == 1
    assert name in error(capsys)
    assert not Path("o").exists()


# ---- code that comes with models -----------------------------------------------------------------


@pytest.fixture
def evil(model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with code of its own everywhere; the user would say yes if asked."""
    folder = Path("evil")
    shutil.copytree(model_folder("gpt2"), folder)
    (folder / "evil.py").write_text(CODE)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE)
    code = {"AutoConfig": "evil.A", "AutoModel": "evil.A", "AutoModelForCausalLM": "evil.A"}
    change(folder / "config.json", auto_map=code)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return folder


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_model_that_needs_its_own_code_is_refused_without_asking(words, evil, capsys):
    change(evil / "config.json", model_type="evil")
    assert cli.run(words(f"--model.backbone.name={evil}")) == 1
    assert "needs Python code that comes with it, which is never run" in error(capsys)


def test_the_config_of_such_a_model_is_not_read_for_an_export_either(evil, capsys):
    change(evil / "config.json", model_type="evil")
    save_prompt("p.safetensors", make("p"))
    given = ["export", "p.safetensors", "--out=o", f"--backbone={evil}"]
    assert main(given) == 1
    assert "backbone 'evil'" in error(capsys)


def test_a_model_of_a_known_type_is_used_without_its_own_code(words, evil):
    assert cli.run(words(f"--model.backbone.name={evil}", "--model.decoding=generate")) == 0


def test_pickled_weights_that_would_run_code_are_refused(words, model_folder, capsys):
    folder = Path("m")
    shutil.copytree(model_folder("gpt2"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb()}, folder / "pytorch_model.bin")
    assert cli.run(words(f"--model.backbone.name={folder}")) == 1
    said = error(capsys)
    assert "backbone 'm' cannot be loaded" in said
    assert "pickled weights that hold more than tensors" in said
    assert "weights_only" not in said  # no advice to run it


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_with_a_file_that_is_cut_short_is_named(words, model_folder, capsys, name):
    folder = Path("m")
    shutil.copytree(model_folder("gpt2"), folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    assert cli.run(words(f"--model.backbone.name={folder}")) == 1
    said = error(capsys)
    assert "'m'" in said or "folder m" in said


# ---- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "path", "arguments"),
    [
        ("model", "os.mkdir", {"path": "exploded"}),
        ("model", "subprocess.Popen", {"args": ["mkdir", "exploded"]}),
        ("model", "torch.nn.Linear", {"in_features": 1, "out_features": 1}),
        ("model", "lightning.pytorch.LightningModule", {}),
        ("model", "prompt_lab.data.datamodule.CrossFitDataModule", {}),
        ("data", "os.mkdir", {"path": "exploded"}),
        ("data", "lightning.pytorch.LightningDataModule", {}),
        ("trainer.callbacks", "os.mkdir", {"path": "exploded"}),
        ("trainer.callbacks", "subprocess.Popen", {"args": ["mkdir", "exploded"]}),
        ("trainer.logger", "subprocess.Popen", {"args": ["mkdir", "exploded"]}),
    ],
)
def test_a_config_makes_no_object_of_another_kind(words, capsys, key, path, arguments):
    """Methods are subclasses of ``PromptMethod``, callbacks of ``Callback``, and so on."""
    content: Any = {"class_path": path, "init_args": arguments}
    for name in reversed(key.split(".")):
        content = {name: content}
    Path("c.yaml").write_text(yaml.safe_dump(content))
    assert status(lambda: cli.run(["fit", "--config=c.yaml", "--run_dir=r"])) == 2
    said = error(capsys)
    assert path in said or "does not accept option 'data." in said
    if key == "model":
        assert "; allowed: PromptTuning, " in said
    assert not Path("r").exists()


@pytest.mark.parametrize("where", ["model", "data", "trainer"])
def test_tags_of_python_in_a_config_are_refused(where):
    Path("c.yaml").write_text(f"{where}: !!python/object/apply:os.mkdir [exploded]\n")
    assert status(lambda: cli.run(["fit", "--config=c.yaml"])) == 2


def test_tags_of_python_in_other_files_are_refused(words, capsys):
    bad = "!!python/object/apply:os.mkdir [exploded]"
    Path("s.yaml").write_text(f"method: grid\nparameters: {bad}\n")
    assert main(["sweep", "s.yaml"]) == 1
    assert "s.yaml is not YAML" in error(capsys)
    Path("t.yaml").write_text(f"mine: {bad}\n")
    assert status(lambda: cli.run(words("--data.task_file=t.yaml"))) != 0
    assert "t.yaml" in error(capsys)


# ---- shells --------------------------------------------------------------------------------------


def test_words_of_a_command_in_a_sweep_file_reach_no_shell(capsys):
    """Its values are the matter of ``test_sweep.py``."""
    stub = "import json, sys; print(json.dumps(sys.argv[1:]), file=open('words.json', 'w'))"
    sweep = {
        "name": SHELL,
        "method": "grid",
        "program": SHELL,
        "command": ["${interpreter}", "-c", stub, "${program}", "; mkdir exploded", "${args}"],
        "parameters": {"a": {"value": SHELL}},
    }
    Path("s.yaml").write_text(yaml.safe_dump(sweep))
    assert sweep_command("s.yaml", "r", dry_run=True) == 0
    shown = shlex.split(capsys.readouterr().out)  # what a shell would make of the line
    assert sweep_command("s.yaml", "r") == 0
    reached = json.loads(Path("words.json").read_text())
    assert reached[:3] == [SHELL, "; mkdir exploded", f"--a={SHELL}"]
    assert [sys.executable, "-c", stub, *reached] == shown


def test_values_of_a_config_reach_no_shell(words):
    given = (f"--model.init.text={SHELL}", "--model.init.name=text", "--run_dir=$(mkdir exploded)")
    assert cli.run(words(*given)) == 0
    assert Path("$(mkdir exploded)/prompts").is_dir()


def test_the_source_has_no_call_that_runs_code_or_a_shell():
    """Guards what no test calls: shells, evaluation, unpickling, code of models."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {reason}"
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and (reason := danger(node))
    ]
    assert not wrong, "\n".join(wrong)


def danger(call: ast.Call) -> str:
    """Why a call may run code that is not ours; empty where it cannot."""
    name = ast.unparse(call.func)
    last = name.rsplit(".", 1)[-1]
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    forbidden = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execvp")
    forbidden += (
        "pickle.load",
        "pickle.loads",
        "joblib.load",
        "torch.hub.load",
        "yaml.unsafe_load",
    )
    needed = {
        "torch.load": ("weights_only", "True"),
        "np.load": ("allow_pickle", "False"),
        "yaml.load": ("Loader", "_Loader"),
    }
    if name in forbidden or "shell" in given:
        return name
    if given.get("trust_remote_code", "False") != "False" or given.get("weights_only") == "False":
        return f"{name} trusts what it reads"
    if last == "from_pretrained" and "trust_remote_code" not in given:
        return f"{name} may ask to run code: give trust_remote_code=False"
    key, value = needed.get(name, ("", None))
    return "" if given.get(key) == value else f"{name} needs {key}={value}"


@pytest.mark.parametrize(
    "text",
    [
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "eval(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x)",
        "yaml.load(x, Loader=yaml.Loader)",
        "AutoConfig.from_pretrained(x)",
        "read(x, trust_remote_code=ok)",
    ],
)
def test_the_search_of_the_source_finds(text):
    assert danger(ast.parse(text, mode="eval").body)  # type: ignore[arg-type]


def test_the_loader_of_yaml_files_is_a_safe_one():
    from prompt_lab.data import tasks

    assert issubclass(tasks._Loader, (yaml.SafeLoader, yaml.CSafeLoader))


# ---- folders -------------------------------------------------------------------------------------

OUTSIDE = ["../../x", "../x", "/x", "a/b", "..", ".x"]


def make(name: str, **changes: Any) -> Prompt:
    """A prompt for the tiny GPT-2 model."""
    zeros = torch.zeros(4, 32)
    facts = {"backbone": "tiny", "backbone_digest": "d", "tokenizer_digest": "t"}
    return Prompt(prompt=zeros, init=zeros, name=name, **{**facts, **changes})


def files() -> set[str]:
    """Everything in and above the folder of the test, as far as a name could lead."""
    return {str(path) for path in Path().resolve().parent.rglob("*")}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_inside_a_prompt_file_leads_nowhere(words, capsys, name, model_folder):
    """Whichever command reads the file: export, import, a fit that starts from its store.

    A fit goes by the file's own name and its runs', so it starts, and writes to its folder alone.
    """
    from prompt_lab.core.backbone import Backbone

    model = Backbone.load(str(model_folder("gpt2")))
    own = {"backbone": model.name, "backbone_digest": model.digest}
    prompt = make(name, **own, tokenizer_digest=model.tokenizer_digest, task="glue-sst2")
    save_prompt("s/s/s/p.safetensors", prompt)
    before = files()
    for given in (
        ["export", "s/s/s/p.safetensors", "--format=tensor", "--out=o/o/o"],
        ["import", "s/s/s/p.safetensors", "--out=o/o/o"],
    ):
        assert main(given) == 1
        assert "cannot be the name of a prompt" in error(capsys)
    assert files() == before
    given = ("--model.init.name=file", "--model.init.path=s/s/s")
    assert cli.run(words(*given)) == 0
    own_folder = str(Path("r").resolve())
    left = files() - before
    assert f"{own_folder}/prompts/glue-sst2_13_seed0_lr0.05_bs4.safetensors" in left
    assert all(path == own_folder or path.startswith(f"{own_folder}/") for path in left)


def test_the_prompts_of_a_store_go_by_their_files_when_they_are_exported():
    save_prompt("s/s/p.safetensors", make("../../x"))
    before = files()
    assert main(["export", "s/s", "--format=tensor", "--out=o/o"]) == 0
    new = {Path(path).relative_to(Path().resolve()).as_posix() for path in files() - before}
    assert new == {"o", "o/o", "o/o/p.safetensors"}


def test_an_index_leads_nowhere():
    """It is written for readers, and never read for paths."""
    save_prompt("x.safetensors", make("x"))
    save_prompt("s/s/p.safetensors", make("p"))
    Path("s/s/index.csv").write_text("name,backbone\n../../x,tiny\n")
    store = PromptStore("s/s")
    assert [row["name"] for row in store.index()] == ["p"]
    with pytest.raises(ValueError, match="cannot be the name of a prompt"):
        store.load(["../../x"])


def test_a_run_inside_a_checkpoint_leads_nowhere(words, capsys):
    assert cli.run(words()) == 0
    saved = torch.load("r/checkpoints/last.ckpt", weights_only=True)
    saved["runs"][0]["task"] = "../../x"
    Path("c/c").mkdir(parents=True)
    torch.save(saved, "c/c/evil.ckpt")
    before = files()
    capsys.readouterr()
    assert main(["export", "c/c/evil.ckpt", "--format=tensor", "--out=o/o"]) == 1
    assert "cannot be the name of a prompt" in error(capsys)
    assert files() == before
