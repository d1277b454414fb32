"""Prompts tuned on chats: fits, their files, and what answers by them follow one template."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_method, make_trainer
from peft import AutoPeftModelForCausalLM
from test_text import CHATML, instruct
from torch import Tensor

from prompt_lab import CrossFitDataModule, RowsDataModule
from prompt_lab.__main__ import main
from prompt_lab.commands.prompts import export_prompts, import_prompts
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.prediction import label_scores, predict
from prompt_lab.files.prompts import find_prompts, load_prompt
from prompt_lab.files.results import read_csv

TASKS = ["glue-sst2", "e2e_nlg_cleaned"]
SYSTEM = "Answer with one word."
CHAT = {"template": "chat", "system": SYSTEM}
LABELS = ["negative", "positive"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny instruct model."""
    model, path = instruct(CHATML, "qwen2"), tmp_path_factory.mktemp("instruct")
    model.model.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder: str) -> Backbone:
    return Backbone.load(folder)


@pytest.fixture
def fit(model: Backbone, fewshot_root: Path, tmp_path: Path) -> Any:
    """Function that fits and tests two tasks, and returns the run's folder."""

    def run(name: str = "run", steps: int = 2, data: Any = CHAT, **given: Any) -> Path:
        method = make_method(model, **given)
        rows = CrossFitDataModule(TASKS, root=str(fewshot_root), samples=[13], **data)
        trainer = make_trainer(tmp_path / name, steps, steps)
        trainer.fit(method, datamodule=rows)
        trainer.save_checkpoint(tmp_path / name / "last.ckpt")
        trainer.test(method, datamodule=rows, verbose=False)
        return tmp_path / name

    return run


def inputs(root: Path, task: str = TASKS[0], shots: int = 16) -> list[str]:
    lines = (root / task / f"{task}_{shots}_13_test.tsv").read_text().splitlines()
    return [line.split("\t")[0] for line in lines]


def run(*words: object) -> int:
    return main(["predict", *map(str, words), "--device=cpu"])


def give(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    stream = io.BytesIO("".join(f"{text}\n" for text in texts).encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream))


def test_train_loss_is_that_of_chats_behind_the_prompt(
    model: Backbone, fewshot_root: Path, tmp_path: Path
) -> None:
    """Reference: plain transformers with the prompt's rows in front of the template's tokens."""
    data = CrossFitDataModule(TASKS[:1], root=str(fewshot_root), samples=[13], **CHAT)
    data.setup()
    method = make_method(model)
    method.look(data, make_trainer(tmp_path))
    prompt, losses = method.bank().detach()[0], []
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    batch = method.draw(data).batch(0, [0])
    for row in batch.rows:
        split = data.splits[TASKS[0], 13]["train"]
        chat = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": split.inputs[row]},
            {"role": "assistant", "content": split.references[row][0]},
        ]
        ids = model.tokenizer.apply_chat_template(chat)["input_ids"]
        ids = ids[: len(ids) - ids[::-1].index(end)]
        start = model.tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)
        count = len(start["input_ids"])
        rows = torch.cat([prompt, model.embed(torch.tensor(ids))])[None]
        with torch.no_grad():
            logits = model.model(inputs_embeds=rows).logits[0, len(prompt) :].log_softmax(1)
        at = torch.arange(count, len(ids))
        losses.append(-logits[at - 1, torch.tensor(ids)[at]].mean())
    found = model.loss(prompt[None], batch)
    torch.testing.assert_close(found, torch.stack(losses), atol=1e-5, rtol=1e-5)


def test_a_fit_on_chats_and_what_answers_by_its_files(
    fit: Any, model: Backbone, fewshot_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the predictions of the test; by the command, in Python, without a word of how."""
    made = fit(label_score="mean", dev_loss=True)
    results = read_csv(made / "results.csv")
    assert {line["template"] for line in results} == {"chat"}
    assert {(line["task"], line["label_score"]) for line in results} == {
        ("glue-sst2", "mean"),
        ("e2e_nlg_cleaned", ""),
    }
    assert json.loads(results[0]["settings"])["data.system"] == SYSTEM
    tested = [json.loads(line) for line in (made / "predictions.jsonl").read_text().splitlines()]
    for task, shots, labels in ((TASKS[0], 16, LABELS), (TASKS[1], 32, None)):
        asked = inputs(fewshot_root, task, shots)
        expected = [line["prediction"] for line in tested if line["task"] == task]
        (found,) = [one for one in find_prompts(made) if one.metadata["task"] == task]
        prompt = found.load(model)
        assert (prompt.template, prompt.system, prompt.label_score) == ("chat", SYSTEM, "mean")
        give(monkeypatch, asked)
        assert run(found.path, "--out", made / "answers.jsonl") == 0
        lines = (made / "answers.jsonl").read_text().splitlines()
        assert [json.loads(line)["prediction"] for line in lines] == expected
        way: dict[str, Any] = {**CHAT, "max_new_tokens": prompt.max_new_tokens}
        way["label_score"] = "mean" if labels else "sum"
        in_python = predict(model, [prompt.prompt], asked, labels, **way)
        assert [text for (text,) in in_python] == expected
        assert in_python != predict(model, [prompt.prompt], asked, labels, max_new_tokens=9)
    (saved, *_) = find_prompts(made / "last.ckpt")
    known = saved.metadata
    assert (known["template"], known["system"], known["label_score"]) == ("chat", SYSTEM, "mean")


def test_scores_of_the_command_are_those_of_python(
    fit: Any, model: Backbone, fewshot_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Told otherwise, the command answers otherwise."""
    (prompt, *_) = [one for one in find_prompts(fit()) if one.metadata["task"] == TASKS[0]]
    capsys.readouterr()
    asked, bank = inputs(fewshot_root)[:3], [prompt.load().prompt]
    for words, way in (
        ((), CHAT),
        (("--label_score=mean",), {**CHAT, "label_score": "mean"}),
        (("--system=Be brief.",), {**CHAT, "system": "Be brief."}),
        (("--template=plain",), {}),
    ):
        give(monkeypatch, asked)
        assert run(prompt.path, "--format=jsonl", *words) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found = torch.tensor([[line["scores"][label] for label in LABELS] for line in lines])
        expected: Tensor = label_scores(model, bank, asked, LABELS, **way)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected[:, 0], atol=1e-5, rtol=0)


def test_prompts_of_different_templates_answer_each_in_its_own_and_it_is_told(
    fit: Any, fewshot_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Reference: the same prompts one at a time."""
    files = [
        next(one.path for one in find_prompts(made) if one.metadata["task"] == TASKS[1])
        for made in (fit("chat"), fit("plain", data={}))
    ]
    names = [read_csv(file.parents[1] / "results.csv")[0]["fit_id"] for file in files]
    assert names[0] != names[1]
    alone = []
    capsys.readouterr()
    for words in ([files[0]], [files[1]], files):
        give(monkeypatch, inputs(fewshot_root, TASKS[1], 32))
        assert run(*words) == 0
        out, told = capsys.readouterr()
        alone.append(out.splitlines())
        assert ("with different templates or system texts" in told) == (len(words) == 2)
    assert alone[2] == [f"{one}\t{other}" for one, other in zip(*alone[:2], strict=True)]


def test_a_chat_goes_to_peft_and_back(
    fit: Any, model: Backbone, fewshot_root: Path, tmp_path: Path
) -> None:
    """Reference: PEFT's own loader, on inputs made by the lines of the exported README."""
    (stored, *_) = [one for one in find_prompts(fit()) if one.metadata["task"] == TASKS[1]]
    (out,) = export_prompts(str(stored.path), str(tmp_path / "peft"))
    text = inputs(fewshot_root, TASKS[1], 32)[1]
    card = (out / "README.md").read_text()
    (code,) = [part for part in card.split("```") if "apply_chat_template" in part]
    names: dict[str, Any] = {"model": AutoPeftModelForCausalLM.from_pretrained(out).eval()}
    exec(code.removeprefix("python").replace("the input", text), names)
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": False}
    with torch.no_grad():
        made = names["model"].generate(**names["inputs"], **settings)[0]
    made = made[names["inputs"]["input_ids"].shape[1] :]
    bank = [stored.load().prompt]
    (found,) = predict(model, bank, [text], max_new_tokens=8, **CHAT)
    assert [names["tokenizer"].decode(made, skip_special_tokens=True).strip()] == found
    for kind in ("peft", "tensor"):
        (out,) = export_prompts(str(stored.path), str(tmp_path / f"as {kind}"), kind)
        path = import_prompts(str(out), str(tmp_path / f"{kind}.safetensors"), model.name)
        again = load_prompt(path, model)
        assert (again.template, again.system) == ("chat", SYSTEM)
        assert again.prompt.equal(bank[0])


def test_a_prompt_from_elsewhere_is_imported_with_its_template(
    folder: str, model: Backbone, tmp_path: Path
) -> None:
    torch.save(torch.zeros(3, model.hidden_size), tmp_path / "other.pt")
    given = (str(tmp_path / "other.pt"), str(tmp_path / "store"), folder)
    path = import_prompts(*given, name="a", template="chat", system=SYSTEM)
    assert (load_prompt(path).template, load_prompt(path).system) == ("chat", SYSTEM)
    assert load_prompt(import_prompts(*given, name="b")).template == "plain"
    with pytest.raises(ValueError, match="system is a part of a chat: give template chat"):
        import_prompts(*given, name="c", system=SYSTEM)


def test_a_start_of_another_template_is_told(fit: Any) -> None:
    (prompt, *_) = find_prompts(fit())
    init = {"init": {"name": "file", "path": str(prompt.path)}}
    with pytest.warns(UserWarning, match="data.template is plain .* is of template chat and sys"):
        fit("other", data={}, **init)


def test_settings_that_cannot_be_are_refused(model: Backbone, tmp_path: Path) -> None:
    rows = {"t": {split: [("a", "b")] for split in ("train", "dev", "test")}}
    with pytest.raises(ValueError, match="template is 'chatml'; allowed: plain, chat"):
        RowsDataModule(rows, template="chatml")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data\.system is a part of a chat: give data\.template"):
        RowsDataModule(rows, system="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="label_score mean is of labels that are scored"):
        make_method(model, label_score="mean", decoding="generate")
    with pytest.raises(ValueError, match=r"model\.label_score is 'max'; allowed: sum, mean"):
        make_method(model, label_score="max")  # before a step is made
    bank = torch.zeros(1, 2, model.hidden_size)
    with pytest.raises(ValueError, match="label_score mean is of labels that are scored, but ans"):
        predict(model, bank, ["a"], label_score="mean")
    with pytest.raises(ValueError, match="label_score is 'max'; allowed: sum, mean"):
        label_scores(model, bank, ["a"], LABELS, label_score="max")  # type: ignore[arg-type]


def test_the_command_refuses_a_mean_of_generated_answers(
    fit: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made = find_prompts(fit())
    (generated,) = [one.path for one in made if one.metadata["task"] == TASKS[1]]
    (scored,) = [one.path for one in made if one.metadata["task"] == TASKS[0]]
    for words in ((generated,), (scored, "--decoding=generate")):
        give(monkeypatch, ["a dog"])
        assert run(*words, "--label_score=mean") == 1
        assert "label_score mean is of labels that are scored" in capsys.readouterr().err
    give(monkeypatch, ["a dog"])
    assert run(scored, "--template=plain", "--system=x") == 1
    assert "system is a part of a chat: give template chat" in capsys.readouterr().err
