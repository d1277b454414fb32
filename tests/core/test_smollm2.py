"""A real language model: prompts go to PEFT and come from it, and answer alike on both sides.

PEFT's side is plain: its own loader, the tokenizer as it is, one row at a time, no cache (with
transformers 5.24, PEFT 0.21.2 repeats the prompt at every token made from one).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_method, make_trainer
from peft import AutoPeftModelForCausalLM, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from prompt_lab.commands.prompts import export_prompts, import_prompts
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.prediction import label_scores
from prompt_lab.files.prompts import load_prompt

ROWS = 20  # of dev and of test
IN_PEFT = 4  # of them, the slow way
TASK, LABELS = "trec", ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
LENGTH = 4  # most tokens of an answer


@pytest.fixture(scope="module")
def root(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real few-shot task, its dev and test cut short."""
    folder = tmp_path_factory.mktemp("root") / TASK
    folder.mkdir()
    for split in ("train", "dev", "test"):
        name = f"{TASK}_16_13_{split}.tsv"
        lines = (test_data / "crossfit" / TASK / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines if split == "train" else lines[:ROWS]))
    return folder.parent


@pytest.fixture(scope="module")
def model(smollm2: str) -> Backbone:
    """Our side."""
    return Backbone.load(smollm2)


def rows(root: Path, split: str) -> list[list[str]]:
    """Inputs and answers."""
    lines = (root / TASK / f"{TASK}_16_13_{split}.tsv").read_text().splitlines()
    return [line.split("\t") for line in lines]


def test_a_prompt_tuned_here_answers_in_peft_as_it_did_here(
    smollm2: str, model: Backbone, root: Path, tmp_path: Path
) -> None:
    """Five steps of a bank, 20 test rows. Reference: PEFT's greedy answers to the first of them."""
    method = make_method(
        *(model,),
        num_virtual_tokens=8,
        batch_size=4,
        decoding="generate",
        max_new_tokens=LENGTH,
        learning_rate=[0.1, 0.01],
    )
    trainer = make_trainer(tmp_path, 5, 5)
    data = make_data(root, [TASK], [13])
    trainer.fit(method, datamodule=data)
    trainer.test(method, datamodule=data, verbose=False)
    run = method.runs[0].name
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    answers = {line["row"]: line["prediction"] for line in lines if line["run"] == run}
    assert (len(lines), len(answers)) == (2 * ROWS, ROWS)
    ours = [answers[row] for row in range(IN_PEFT)]

    file = tmp_path / "prompts" / f"{run}.safetensors"
    (folder,) = export_prompts(str(file), str(tmp_path / "peft"))
    again = import_prompts(folder, str(tmp_path / "again.safetensors"), smollm2)
    torch.testing.assert_close(load_prompt(again).prompt, load_prompt(str(file)).prompt)
    peft: Any = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    theirs = []
    for text, _ in rows(root, "test")[:IN_PEFT]:
        ids = tokenizer(text, return_tensors="pt")
        made = peft.generate(**ids, max_new_tokens=LENGTH, do_sample=False, use_cache=False)
        new = made[0, ids["input_ids"].shape[1] :]
        theirs.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert theirs == ours
    assert len({*answers.values()}) > 2


def joined(tokenizer: Any, text: str, label: str) -> tuple[Tensor, int]:
    """Ids (1, L) of a text and its label, and how many are the label's, the end among them."""
    ids = [*tokenizer(f"{text} {label}")["input_ids"], tokenizer.eos_token_id]
    return torch.tensor([ids]), len(ids) - len(tokenizer(text)["input_ids"])


def test_a_prompt_tuned_with_peft_scores_labels_here_as_it_does_there(
    smollm2: str, model: Backbone, root: Path, tmp_path: Path
) -> None:
    """Reference: PEFT's logits at the tokens of each label, after each input."""
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Which kind of answer does the question ask for?",
        num_virtual_tokens=8,
        tokenizer_name_or_path=smollm2,
    )
    peft: Any = get_peft_model(base, config)
    start = peft.prompt_encoder["default"].embedding.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.03)
    for text, label in rows(root, "train")[:3]:
        ids, count = joined(tokenizer, text, label)
        labels = torch.cat([torch.full_like(ids[:, :-count], -100), ids[:, -count:]], dim=1)
        peft(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft.eval().save_pretrained(tmp_path / "peft")

    path = import_prompts(str(tmp_path / "peft"), str(tmp_path / "p.safetensors"), smollm2)
    prompt = load_prompt(path, model).prompt
    assert (prompt - start).abs().max() > 0.05
    inputs = [text for text, _ in rows(root, "test")[:2]]
    expected = torch.empty(len(inputs), len(LABELS))
    for i, text in enumerate(inputs):
        for j, label in enumerate(LABELS):
            ids, count = joined(tokenizer, text, label)
            with torch.no_grad():
                logits = peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            at = logits[-count - 1 : -1].log_softmax(1)
            expected[i, j] = at.gather(1, ids[0, -count:, None]).sum()
    found = label_scores(model, [prompt], inputs, LABELS)[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
