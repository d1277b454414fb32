"""What is left when things break: kills, full disks, damaged files, two processes at once.

Fits run in forks of this process, which has paid for the imports. What a fault leaves behind is
compared with a fit that nothing disturbed. A run that diverges inside a bank is the matter of
``test_prompt_tuning.py``, exact resume that of ``test_resume.py``.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from prompt_lab.__main__ import main
from prompt_lab.commands import fit as cli
from prompt_lab.commands.sweep import make_trials, read_sweep, sweep_command, trial_folder
from prompt_lab.files.peft import load_checkpoint
from prompt_lab.files.prompts import PromptStore, load_prompt
from prompt_lab.files.results import (
    CURVE_COLUMNS,
    append_curves,
    read_csv,
    start_curves,
    write_csv,
)
from prompt_lab.files.tensors import held, read_safetensors, write_atomically
from prompt_lab.methods.method import PromptMethod

pytestmark = pytest.mark.usefixtures("own_folder")

STEPS = 4
LAST = Path("r/checkpoints/last.ckpt")
STORE = Path("r/prompts")

Words = Callable[..., list[str]]


@pytest.fixture(scope="session")
def words(model_folder: Callable[[str], Path], fewshot_root: Path) -> Words:
    """Function that gives the words of a command: one prompt, an evaluation after each step."""

    def given(*more: str, command: str = "fit") -> list[str]:
        return [
            *(command, f"--model.backbone.name={model_folder('gpt2')}"),
            *("--model.num_virtual_tokens=4", "--model.learning_rate=0.05"),
            *("--model.batch_size=4", f"--data.root={fewshot_root}"),
            *("--data.tasks=[glue-sst2]", "--data.samples=[13]", "--trainer.accelerator=cpu"),
            *("--trainer.logger=false", f"--trainer.max_steps={STEPS}"),
            *("--trainer.val_check_interval=1", "--run_dir=r", *more),
        ]

    return given


@pytest.fixture(scope="session")
def undisturbed(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fit that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    child = start(words(f"--run_dir={folder}"), folder / "log")
    assert ended(child) == 0, (folder / "log").read_text()
    return folder


def start(given: list[str], log: Path, prepare: Callable[[], Any] = bool) -> int:
    """Run a command in a fork of this process; ``prepare`` is called in it first."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        signal.alarm(60)  # a process that hangs ends itself
        sys.stdout = sys.stderr = log.open("a", buffering=1)
        prepare()
        status = cli.run(given)
    finally:
        os._exit(status)


def finish(words: Words) -> None:
    """Run the fit to its end, from its last checkpoint if there is one, else anew."""
    assert cli.run(words("--resume")) == 0


def ended(child: int) -> int:
    """Exit status of a fork, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_like(folder: Path, other: Path) -> None:
    """Curves, prompts and the last state are the same to the bit, but for the seconds."""
    assert (folder / "curves.csv").read_bytes() == (other / "curves.csv").read_bytes()
    assert sorted(os.listdir(folder / "prompts")) == sorted(os.listdir(other / "prompts"))
    pair = [load_prompt(next((f / "prompts").glob("*.safetensors"))) for f in (folder, other)]
    assert pair[0].prompt.numpy().tobytes() == pair[1].prompt.numpy().tobytes()
    assert {**pair[0].metadata(), "seconds": 0} == {**pair[1].metadata(), "seconds": 0}
    files = [f / "checkpoints/last.ckpt" for f in (folder, other)]
    saved, expected = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    assert all(saved[name].equal(value) for name, value in expected.items() if name != "seconds")


def assert_told(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """The last line of the errors is one sentence of the command, and there is no traceback."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("prompt-lab: ")]
    assert said.endswith(f"{line}\n")
    for part in parts:
        assert part in line


# ---- killed processes ----------------------------------------------------------------------------


def die_in_write(name: str, call: int, place: str) -> None:
    """Kill this process in a write of the file: with half of the draft, or before its move."""
    write, replace, calls = Path.write_bytes, os.replace, [0]

    def killed(path: Path) -> bool:
        calls[0] += name in path.name
        return name in path.name and calls[0] == call

    def half(self: Path, content: bytes) -> int:
        if place == "draft" and killed(self):
            write(self, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, content)

    def never(source: Path, target: Path) -> None:
        if place == "move" and killed(Path(target)):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    Path.write_bytes, os.replace = half, never  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("place", ["draft", "move"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(words, undisturbed, place):
    child = start(words(), Path("log"), lambda: die_in_write("last.ckpt", 3, place))
    assert ended(child) == -signal.SIGKILL
    assert torch.load(LAST, weights_only=True)["global_step"] == 2
    (prompt,) = load_checkpoint(LAST)
    assert prompt.prompt.isfinite().all()
    drafts = list(LAST.parent.glob(".*.part"))
    assert len(drafts) == 1

    finish(words)
    assert os.listdir(LAST.parent) == ["last.ckpt"]  # the draft is gone
    assert_like(Path("r"), undisturbed)


def test_a_fit_that_is_killed_after_its_last_step_writes_its_prompts_when_it_is_resumed(
    words, undisturbed
):
    child = start(words(), Path("log"), lambda: die_in_write(".safetensors", 1, "draft"))
    assert ended(child) == -signal.SIGKILL
    assert PromptStore(STORE).index() == []
    assert len(list(STORE.glob(".*.part"))) == 1
    finish(words)  # which takes the draft away
    assert_like(Path("r"), undisturbed)


def test_a_fit_that_is_killed_again_and_again_at_any_moment_comes_to_the_same_end(
    words, undisturbed
):
    delays = random.Random(0)
    for _ in range(5):
        child = start(words("--resume"), Path("log"))
        time.sleep(delays.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
        assert ended(child) in (-signal.SIGKILL, 0), Path("log").read_text()
        if LAST.is_file():
            assert len(load_checkpoint(LAST)) == 1
        for path in STORE.glob("*.safetensors"):
            load_prompt(path)
    finish(words)
    assert_like(Path("r"), undisturbed)
    assert "Traceback" not in Path("log").read_text()


def test_a_fit_that_is_told_to_end_does_not_count_as_done(words, undisturbed):
    """As by a scheduler that needs the machine; Lightning's own exception has no status."""

    def tell() -> None:
        def once(self: PromptMethod, *given: Any) -> None:
            if self.trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        PromptMethod.on_train_batch_start = once  # type: ignore[method-assign]

    child = start(words(), Path("log"), tell)
    assert ended(child) == 128 + signal.SIGTERM
    assert "ended by SIGTERM; a fit goes on with --resume" in Path("log").read_text()
    finish(words)
    assert_like(Path("r"), undisturbed)


def test_checkpoints_do_not_pass_through_the_folder_of_temporary_files(words, monkeypatch):
    """Which may be on another disk, from where a move is a copy that can be cut short."""
    monkeypatch.setattr(tempfile, "tempdir", str(Path("not there").resolve()))
    assert cli.run(words("--trainer.max_steps=1")) == 0
    assert torch.load(LAST, weights_only=True)["global_step"] == 1


def test_a_line_of_the_curves_that_was_cut_short_is_left_out_of_a_resumed_fit():
    path = Path("curves.csv")
    write_csv(path, CURVE_COLUMNS, [])
    append_curves(path, [{"step": step, "run": "a", "dev": 0.5} for step in (1, 2, 100)])
    whole = path.read_text()
    end = whole.index("100,a")
    for cut in range(end + 1, end + 12):  # "1" of 100 would be a step that is kept
        path.write_text(whole[:cut])
        start_curves(path, 50)
        assert path.read_text() == whole[:end], whole[end:cut]


# ---- disks and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call", "number"),
    [
        ("last.ckpt", 2, errno.ENOSPC),
        ("last.ckpt", 2, errno.EACCES),
        ("glue-sst2_13", 1, errno.ENOSPC),
        ("index.csv", 1, errno.ENOSPC),
        ("config-fit.yaml", 1, errno.EROFS),
    ],
)
def test_a_write_that_fails_is_told_and_the_fit_can_be_resumed(
    words, undisturbed, monkeypatch, capsys, name, call, number
):
    write, calls = Path.write_bytes, [0]

    def fails(self: Path, content: bytes) -> int:
        calls[0] += name in self.name
        if name in self.name and calls[0] == call:
            write(self, content[:100])
            raise OSError(number, os.strerror(number))
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fails)
        assert cli.run(words()) == 1
    assert_told(capsys, name, os.strerror(number), "make room there, or give another folder")
    assert not list(Path("r").rglob("*.part"))
    if LAST.is_file():
        assert torch.load(LAST, weights_only=True)["global_step"] == (1 if call == 2 else STEPS)
    finish(words)
    assert_like(Path("r"), undisturbed)


def limit_files(size: int) -> None:
    """No file of this process may grow beyond that many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_real_limit_on_the_size_of_files_is_told_and_leaves_no_part(words):
    child = start(words(), Path("log"), lambda: limit_files(8000))
    assert ended(child) == 1
    said = Path("log").read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("prompt-lab: ")
    assert "r/checkpoints/last.ckpt cannot be written (File too large)" in said
    assert os.listdir("r/checkpoints") == []


def test_curves_that_do_not_fit_are_told_and_the_fit_goes_on_where_there_is_room(words):
    """Several lines at once; the limit is in the middle of one."""
    path = Path("curves.csv")
    write_csv(path, CURVE_COLUMNS, [])
    rows = [{"step": 7, "run": f"run {n}", "dev": 0.5} for n in range(9)]

    def write() -> None:
        limit_files(path.stat().st_size + 100)
        try:
            append_curves(path, rows)
        except OSError as error:
            print(error)

    child = start(["no command"], Path("log"), write)
    assert ended(child) != 0
    assert "curves.csv cannot be written (File too large)" in Path("log").read_text()
    written = read_csv(path)
    assert None in written[-1].values()
    start_curves(path, 7)
    kept = [row["run"] for row in read_csv(path)]
    assert kept == [row["run"] for row in rows[: len(written) - 1]]
    assert kept


@pytest.mark.parametrize("folder", ["file", "file/r"])
def test_a_file_where_the_folder_should_be_is_told(words, capsys, folder):
    """As root no folder is unwritable; a file in its place is to everybody."""
    Path("file").write_text("mine")
    write_sweep()
    assert cli.run(words(f"--run_dir={folder}")) == 1
    assert_told(capsys, f"{folder}/.lock cannot be written", "give another folder")
    assert main(["sweep", "s.yaml", f"--run_dir={folder}"]) == 1
    assert_told(capsys, f"{folder}/.lock cannot be written", "give another folder")
    with pytest.raises(OSError, match=rf"{folder}/a.csv cannot be written"):
        write_atomically(Path(folder, "a.csv"), b"")
    assert Path("file").read_text() == "mine"


# ---- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 3000, -1])
@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_damaged_checkpoint_is_told(words, undisturbed, capsys, kept, command):
    Path("x.ckpt").write_bytes((undisturbed / "checkpoints/last.ckpt").read_bytes()[:kept])
    assert cli.run(words("--ckpt_path=x.ckpt", command=command)) == 1
    assert_told(capsys, "x.ckpt: not a file of tensors", "or damaged", "give another file")
    assert not Path("r").exists()


@pytest.mark.parametrize("content", [torch.zeros(3), {"state_dict": {}}, [1, 2]])
def test_a_file_of_something_else_in_place_of_a_checkpoint_is_told(words, capsys, content):
    torch.save(content, "x.ckpt")
    assert cli.run(words("--ckpt_path=x.ckpt")) == 1
    assert_told(capsys, "x.ckpt is not the checkpoint of a fit: leave --ckpt_path out")


@pytest.mark.parametrize(
    ("kind", "read"), [("prompts/*.safetensors", load_prompt), ("checkpoints/*", load_checkpoint)]
)
def test_whatever_is_damaged_in_a_file_the_error_names_it(undisturbed, kind, read):
    """Cut or changed at random; only what says nothing of the numbers may go unseen."""
    (path,) = undisturbed.glob(kind)
    whole, told = path.read_bytes(), []
    damaged = Path(f"damaged{path.suffix}")
    chance = random.Random(1)
    for _ in range(300):
        content = bytearray(whole)
        if chance.random() < 0.3:
            content = content[: chance.randrange(len(content))]
        for _ in range(chance.choice([0, 1, 3, 30])):
            if content:
                content[chance.randrange(min(900, len(content)))] = chance.choice(b'"0x{}\xff\x00')
        damaged.write_bytes(content)
        try:
            read(damaged)
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 100
    assert all(sentence.startswith(str(damaged)) for sentence in told)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": "one"}, "no version of the format"),
        ({"labels": "[1,"}, "its metadata is not JSON"),
        ({"name": "3"}, "in its metadata name is 3"),
    ],
)
def test_damaged_metadata_of_a_prompt_is_told(words, undisturbed, capsys, changes, reason):
    (path,) = (undisturbed / "prompts").glob("*.safetensors")
    tensors, metadata = read_safetensors(path)
    STORE.mkdir(parents=True)
    save_file(tensors, STORE / path.name, {**metadata, **changes})
    assert cli.run(words(command="test")) == 1
    assert_told(capsys, path.name, reason)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"no,such\n1,2\n", b"step,run\nx,a\n"])
def test_damaged_curves_are_told_when_a_fit_is_resumed(words, undisturbed, capsys, content):
    shutil.copytree(undisturbed, "r")
    Path("r/curves.csv").write_bytes(content)
    assert cli.run(words("--resume", f"--trainer.max_steps={STEPS + 1}")) == 1
    assert_told(capsys, "r/curves.csv", "damaged")
    Path("r/curves.csv").unlink()
    assert cli.run(words("--resume", f"--trainer.max_steps={STEPS + 1}")) == 0


def test_an_index_that_is_damaged_is_not_read_and_is_made_anew(words, undisturbed):
    shutil.copytree(undisturbed, "r")
    for content in (b"\xff\x00", b"name\n../../x\n", b""):
        (STORE / "index.csv").write_bytes(content)
        (row,) = PromptStore(STORE).index()
        assert len(PromptStore(STORE).load([row["name"]])) == 1
    PromptStore(STORE).write_index()
    assert (STORE / "index.csv").read_bytes() == (undisturbed / "prompts/index.csv").read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.csv", b"\xff\xfe\x00"),
        ("results.csv", b"no,such\n1,2\n"),
        ("results.csv", b"variant,task,sample,init_seed,dev,test\ntuned,t,13,0,high,\n"),
        ("prompts/index.csv", b"no,such\n1,2\n"),
        ("trial.json", b'{"state": "do'),
        ("trial.json", b"[]"),
    ],
)
def test_a_damaged_file_of_a_trial_is_told(capsys, name, content):
    write_sweep()
    (trial,) = make_trials(read_sweep(Path("s.yaml")))
    folder = trial_folder(Path("r"), trial)
    folder.joinpath("prompts").mkdir(parents=True)
    (folder / "trial.json").write_text(json.dumps({"state": "done", "seconds": 1.0}))
    (folder / name).write_bytes(content)
    assert main(["sweep", "s.yaml", "--run_dir=r"]) == 1
    assert_told(capsys, str(folder), "damaged", "delete")
    (folder / name).unlink()
    (folder / "trial.json").unlink(missing_ok=True)
    assert sweep_command("s.yaml", "r") == 0


def write_sweep() -> None:
    """A sweep file with one trial, which does nothing."""
    command = ["${interpreter}", "-c", "pass", "${args}"]
    content = {"method": "grid", "command": command, "parameters": {"a": {"value": 1}}}
    Path("s.yaml").write_text(yaml.safe_dump(content))


# ---- two processes -------------------------------------------------------------------------------


def sleep_at(step: int) -> None:
    """Let this process say that it has come to a step, and stay there."""
    original = cli.METHODS["PromptTuning"].on_train_batch_start

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.trainer.global_step == step:
            Path("there").touch()
            time.sleep(50)
        return original(self, *args, **kwargs)

    cli.METHODS["PromptTuning"].on_train_batch_start = called  # type: ignore[method-assign]


def test_a_second_process_in_a_folder_is_refused_until_the_first_has_ended(
    words, undisturbed, capsys
):
    child = start(words(), Path("log"), lambda: sleep_at(3))
    try:
        for _ in range(1000):
            if Path("there").exists():
                break
            time.sleep(0.02)
        before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
        for given in (words(), words("--resume"), words("--overwrite"), words(command="test")):
            assert cli.run(given) == 1
            told = "r is in use by another prompt-lab fit, validate or test"
            assert_told(capsys, told, f"(process {child})", "wait for it or stop it")
        after = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
        assert after == before
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)
    assert cli.run(words("--resume")) == 0  # at once
    assert_like(Path("r"), undisturbed)


def test_a_folder_is_let_go_after_an_error_and_can_be_held_again():
    def fails(folder: Path) -> None:
        with held(folder, "me"):
            raise RuntimeError("inside")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"):
            fails(Path("f"))
    told = rf"by me \(process {os.getpid()}\)"
    with held(Path("f"), "me"), pytest.raises(ValueError, match=told):
        held(Path("f"), "me").__enter__()


@pytest.mark.parametrize("system", ["without the module", "without locks on this disk"])
def test_where_there_are_no_locks_nothing_is_held_and_all_goes_on(monkeypatch, system):
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    if system == "without the module":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    with held(Path("f"), "me"), held(Path("f"), "me"):
        assert Path("f/.lock").read_text() == str(os.getpid())


def test_a_dry_run_neither_holds_nor_needs_the_folder(words):
    with held(Path("r"), "me"), pytest.raises(SystemExit) as leaving:
        cli.run(words("--dry_run"))
    assert leaving.value.code == 0
    assert os.listdir("r") == [".lock"]
