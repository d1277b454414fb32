"""``export`` and ``import``, PEFT folders, tensors, checkpoints; nothing overwritten or guessed.

The references are safetensors, NumPy and the state of a fit itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HIDDEN, make_data, make_trainer
from safetensors import safe_open
from safetensors.torch import save_file

from prompt_lab.commands.prompts import export_prompts, import_prompts
from prompt_lab.core.backbone import Backbone
from prompt_lab.files.peft import load_checkpoint, load_peft, save_peft
from prompt_lab.files.prompts import Prompt, PromptStore, load_prompt, save_prompt
from prompt_lab.files.results import read_csv
from prompt_lab.methods.configs import BackboneConfig
from prompt_lab.methods.prompt_tuning import PromptTuning

Factory = Callable[..., Backbone]
Folders = Callable[[str], Path]
N = 4


def make(name: str = "one", seed: int = 0, **changes: Any) -> Prompt:
    """A prompt for the tiny T5 by name, with digests of something else."""
    generator = torch.Generator().manual_seed(seed)
    prompt, init = (torch.randn(N, HIDDEN, generator=generator) for _ in range(2))
    made = Prompt(prompt, init, name, "tiny-t5", "0123", "4567", task="emotion", sample=13)
    return replace(made, **changes)


@pytest.fixture
def store(model_folder: Folders, tmp_path: Path) -> Path:
    """A prompt store of three prompts for the tiny T5."""
    model = str(model_folder("t5"))
    PromptStore(tmp_path / "store").save(
        make(name, seed, backbone=model) for seed, name in enumerate(("a", "b", "c"))
    )
    return tmp_path / "store"


# ---- export -------------------------------------------------------------------------------------


def test_each_prompt_of_a_store_becomes_a_folder(store: Path, tmp_path: Path) -> None:
    written = export_prompts(str(store), str(tmp_path / "out"))
    assert written == [tmp_path / "out" / name for name in ("a", "b", "c")]
    for folder in written:
        original = load_prompt(store / f"{folder.name}.safetensors")
        found = load_peft(folder)
        assert torch.equal(found.prompt, original.prompt)
        assert (found.name, found.backbone) == (original.name, original.backbone)


def test_only_named_prompts_are_written_in_the_order_named(store: Path, tmp_path: Path) -> None:
    written = export_prompts(str(store), str(tmp_path / "out"), names=["c", "a", "c"])
    assert [path.name for path in written] == ["c", "a"]
    with pytest.raises(FileNotFoundError, match=r"no prompt x, y; there are: a, b, c"):
        export_prompts(str(store), str(tmp_path / "new"), names=["x", "a", "y"])
    assert not (tmp_path / "new").exists()


def test_a_tensor_file_holds_one_tensor_and_what_it_is_for(store: Path, tmp_path: Path) -> None:
    written = export_prompts(str(store), str(tmp_path / "out"), "tensor", ["a"], "someone/model")
    assert written == [tmp_path / "out" / "a.safetensors"]
    with safe_open(str(written[0]), "pt") as file:
        assert list(file.keys()) == ["prompt_embeds"]
        found, metadata = file.get_tensor("prompt_embeds"), file.metadata()
    assert found.dtype == torch.float32
    assert torch.equal(found, load_prompt(store / "a.safetensors").prompt)
    assert metadata == {"format": "pt", "backbone": "someone/model", "task": "emotion"}


def test_nothing_is_overwritten_and_nothing_is_half_done(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_prompts(str(store), str(out), names=["b"])
    before = (out / "b" / "adapter_model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"out/b: there already and not overwritten"):
        export_prompts(str(store), str(out))
    assert [path.name for path in out.iterdir()] == ["b"]
    assert (out / "b" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_backbone_that_is_given_becomes_the_base_model(
    store: Path, model_folder: Folders, tmp_path: Path
) -> None:
    """Of another kind, here, so that the config is seen to be read."""
    (folder,) = export_prompts(
        str(store), str(tmp_path / "out"), names=["a"], backbone=str(model_folder("gpt2"))
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder("gpt2"))
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("nowhere", {}, "no prompt file or folder .*nowhere: give"),
        ("nowhere.ckpt", {}, "no prompt file or folder .*nowhere.ckpt: give"),
        ("empty", {}, "empty holds no prompts: give a prompt file"),
        ("store", {"out": "o.safetensors"}, "give a folder; only a single prompt as a tensor"),
        ("store", {"backbone": "nobody/nothing"}, "layers and heads of backbone 'nobody/nothing'"),
        ("narrow.safetensors", {}, "one: prompt of width 31, but backbone .* hidden size 32"),
    ],
)
def test_bad_exports_are_refused_before_anything_is_written(
    store: Path, tmp_path: Path, source: str, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    narrow = torch.zeros(N, 31)
    known = load_prompt(store / "a.safetensors").backbone
    wrong = make(prompt=narrow, init=narrow, backbone=known)
    save_prompt(tmp_path / "narrow.safetensors", wrong)
    settings = {"out": "out", **settings}
    out = tmp_path / settings.pop("out")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        export_prompts(str(tmp_path / source), str(out), **settings)
    assert "\n" not in str(error.value)
    assert not out.exists()


# ---- import -------------------------------------------------------------------------------------


@pytest.fixture
def peft(model_folder: Folders, tmp_path: Path) -> Path:
    """A PEFT folder for the tiny T5."""
    prompt = make(backbone=str(model_folder("t5")))
    save_peft(tmp_path / "peft", prompt, "SEQ_2_SEQ_LM", 2, 4)
    return tmp_path / "peft"


def test_a_peft_folder_becomes_a_prompt_of_its_base_model(
    backbone: Factory, model_folder: Folders, peft: Path, tmp_path: Path
) -> None:
    path = import_prompts(str(peft), str(tmp_path / "new.safetensors"), task="emotion")
    model = Backbone.load(str(model_folder("t5")))
    found = load_prompt(path, model)  # digests are checked here
    assert torch.equal(found.prompt, make().prompt)
    assert torch.equal(found.init, make().prompt)
    assert (found.name, found.task) == ("new", "emotion")
    assert found.tokenizer_digest == model.tokenizer_digest
    assert (found.start, found.start_file) == ("prompt", str(peft))


def test_imports_go_into_a_store_and_its_index(
    store: Path, peft: Path, tmp_path: Path, model_folder: Folders
) -> None:
    assert import_prompts(str(peft), str(store)) == store / "peft.safetensors"
    assert import_prompts(str(peft), str(store), name="d") == store / "d.safetensors"
    names = [row["name"] for row in read_csv(store / "index.csv")]
    assert names == ["a", "b", "c", "d", "peft"]
    other = tmp_path / "made"
    assert import_prompts(str(peft), str(other), str(model_folder("t5"))).parent == other


def write_tensor(path: Path, values: torch.Tensor) -> None:
    """One tensor in the format that the path's ending names."""
    if path.suffix == ".npy":
        np.save(path, values.numpy())
    elif path.suffix == ".safetensors":
        save_file({"anything": values}, path)
    elif path.suffix == ".pt":
        torch.save(values, path)
    else:
        torch.save({"prompt": torch.nn.Parameter(values)}, path)


@pytest.mark.parametrize("ending", [".npy", ".safetensors", ".pt", ".bin", ".pth"])
def test_one_matrix_of_any_float_becomes_a_prompt(
    model_folder: Folders, tmp_path: Path, ending: str
) -> None:
    values = make().prompt.half()
    source = tmp_path / f"source{ending}"
    write_tensor(source, values)
    path = import_prompts(str(source), str(tmp_path / "store"), str(model_folder("t5")))
    found = load_prompt(path)
    assert path.name == "source.safetensors"
    assert torch.equal(found.prompt, values.float())
    assert torch.equal(found.init, values.float())
    assert (found.start, found.start_file) == ("prompt", str(source))


def test_export_and_import_give_the_prompt_back(store: Path, tmp_path: Path) -> None:
    """Both formats; the tensor file names backbone and task, PEFT's the backbone alone."""
    source = str(store / "a.safetensors")
    original = load_prompt(source)
    for format, task in (("peft", ""), ("tensor", "emotion")):
        (written,) = export_prompts(source, str(tmp_path / format), format)  # pyright: ignore
        found = load_prompt(import_prompts(str(written), str(tmp_path / f"{format}.safetensors")))
        assert torch.equal(found.prompt, original.prompt)
        assert (found.backbone, found.task) == (original.backbone, task)


def test_a_prompt_file_keeps_what_it_knows_under_another_name(store: Path, tmp_path: Path) -> None:
    """Its backbone is not loaded unless one is given; then it must be the one it was made for."""
    source = str(store / "a.safetensors")
    path = import_prompts(source, str(tmp_path / "other"), name="z", task="glue-sst2")
    found, original = load_prompt(path), load_prompt(source)
    expected = {**original.metadata(), "name": "z", "task": "glue-sst2"}
    assert found.metadata() == expected
    assert torch.equal(found.init, original.init)
    with pytest.raises(ValueError, match=r"with weights 0123, but .* has weights"):
        import_prompts(source, str(tmp_path / "more"), original.backbone)


def bad_sources(folder: Path) -> None:
    """Files that hold no single prompt."""
    values = make().prompt
    save_file({"a": values, "b": values.clone()}, folder / "two.safetensors")
    np.save(folder / "ids.npy", np.zeros((2, 3), dtype=np.int64))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "flat.npy", np.zeros(3, dtype=np.float32))
    np.save(folder / "empty.npy", np.zeros((0, HIDDEN), dtype=np.float32))
    np.save(folder / "nan.npy", np.full((2, HIDDEN), np.nan, dtype=np.float32))
    np.save(folder / "narrow.npy", np.zeros((2, 31), dtype=np.float32))
    np.save(folder / "unnamed.npy", np.zeros((2, HIDDEN), dtype=np.float32))
    torch.save(torch.nn.Linear(2, 2), folder / "code.pt")
    torch.save([values, "text"], folder / "list.pt")
    (folder / "broken.pt").write_bytes(b"no tensors")
    (folder / "broken.npy").write_bytes(b"no array")
    (folder / "broken.safetensors").write_bytes(b"no tensors")
    (folder / "text.txt").write_text("a prompt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "two.safetensors",
            r"one tensor of floats \(N, D\); the file holds 2 things: torch.float32",
        ),
        ("ids.npy", r"one tensor of floats .* holds 1 things: torch.int64 \[2, 3\]"),
        ("objects.npy", "damaged, or not an array of numbers"),
        ("flat.npy", r"one tensor of floats \(N, D\).* torch.float32 \[3\]"),
        ("empty.npy", r"one tensor of floats \(N, D\)"),
        ("nan.npy", "numbers that are not finite"),
        ("narrow.npy", "width 31 made for 'a model it does not name', but .* hidden size 32"),
        ("code.pt", "not a file of tensors and plain values"),
        ("list.pt", r"one tensor of floats \(N, D\); the file holds 1 things: list \[\]"),
        ("broken.pt", "not a file of tensors and plain values"),
        ("broken.npy", "damaged, or not an array"),
        ("broken.safetensors", "damaged or not a safetensors file"),
        ("text.txt", "a tensor file ends with one of .safetensors, .npy, .pt"),
        ("nowhere.npy", "no PEFT folder, prompt file or tensor file"),
        (".", "no adapter_config.json in"),
        ("peft/adapter_model.safetensors", "is part of a PEFT folder: give the folder"),
    ],
)
def test_sources_that_are_no_single_prompt_are_refused(
    model_folder: Folders, peft: Path, tmp_path: Path, source: str, message: str
) -> None:
    bad_sources(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        import_prompts(str(tmp_path / source), str(tmp_path / "out"), str(model_folder("t5")))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(
    fewshot_root: Path, model_folder: Folders, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PromptTuning, Path]:
    """Two tasks x two samples x two rates, trained for two steps, and the checkpoint of the fit."""
    folder = tmp_path_factory.mktemp("fit")
    settings = {"num_virtual_tokens": N, "learning_rate": [0.03, 0.01], "batch_size": 4}
    method = PromptTuning(backbone=BackboneConfig(str(model_folder("t5"))), **settings)
    trainer = make_trainer(folder, steps=2, every=1)
    data = make_data(fewshot_root, ["glue-sst2", "emotion"], [13, 42])
    trainer.fit(method, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return method, folder / "last.ckpt"


def altered(path: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint with something changed."""
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, to)
    return to


def test_a_checkpoint_gives_what_the_fit_wrote_to_its_store(
    fitted: tuple[PromptTuning, Path],
) -> None:
    _, path = fitted
    found = load_checkpoint(path)
    store = PromptStore(path.parent / "prompts")
    assert len(found) == 8
    for prompt, stored in zip(found, store.load([p.name for p in found]), strict=True):
        assert torch.equal(prompt.prompt, stored.prompt)
        assert torch.equal(prompt.init, stored.init)
        known = ("backbone", "task", "sample", "init_seed", "learning_rate", "batch_size")
        for field in (*known, "steps", "dev_score", "backbone_digest", "tokenizer_digest"):
            assert getattr(prompt, field) == getattr(stored, field), field


def test_a_run_that_was_never_scored_gives_its_last_prompt(
    fitted: tuple[PromptTuning, Path], tmp_path: Path
) -> None:
    def unscore(saved: dict[str, Any]) -> None:
        saved["state_dict"]["keeper.step"][1] = -1
        saved["state_dict"]["keeper.score"][1] = -torch.inf
        saved["state_dict"]["prompt"] += 1

    found = load_checkpoint(altered(fitted[1], tmp_path / "x.ckpt", unscore))
    method = fitted[0]
    assert torch.equal(found[0].prompt, method.best[0])
    assert torch.equal(found[1].prompt, method.prompt[1].detach() + 1)
    assert (found[1].steps, found[1].dev_score) == (2, None)


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.pop("runs"),
        lambda saved: saved["state_dict"].pop("keeper.kept_bank"),
        lambda saved: saved.pop("hyper_parameters"),
        lambda saved: saved.update(runs=["what"]),
        lambda saved: saved.clear(),
    ],
)
def test_checkpoints_of_something_else_are_refused(
    fitted: tuple[PromptTuning, Path], tmp_path: Path, change: Callable[[Any], None]
) -> None:
    with pytest.raises(ValueError, match=r"x.ckpt: not a checkpoint of PromptTuning"):
        load_checkpoint(altered(fitted[1], tmp_path / "x.ckpt", change))


# ---- initial prompts from them ------------------------------------------------------------------
