"""``prompt-lab vectors mix``: its prompts against sums in NumPy, and tuning from them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_backbone
from test_intrinsic_subspace import TASKS, TOKENS, make_store
from test_prompt_tuning import make_data, make_method, make_trainer

from prompt_lab.commands import offline
from prompt_lab.commands.mix_command import mix_prompts
from prompt_lab.files.prompts import PromptStore, load_prompt
from prompt_lab.methods.starts import InitConfig

TARGET, *SOURCES = TASKS


@pytest.fixture
def store(tmp_path, backbone) -> Path:
    """A store with a prompt of each of the four tasks, and a worse one of the first."""
    return make_store(tmp_path / "store", backbone("gpt2"))


def test_a_mixture_is_the_sum_by_cosines_of_mean_rows(store, tmp_path, capsys):
    file = store / f"{TARGET}.safetensors"
    (path,) = mix_prompts(str(file), prompts=[str(store)], out=str(tmp_path / "out"))
    said = capsys.readouterr().out
    made, target = load_prompt(path), load_prompt(file).prompt.double().numpy()
    sources = [load_prompt(store / f"{task}.safetensors").prompt.double() for task in SOURCES]
    stacked = np.stack([source.numpy() for source in sources])
    means, own = stacked.mean(1), target.mean(0)
    cosines = means @ own / np.linalg.norm(means, axis=1) / np.linalg.norm(own)
    weights = np.maximum(cosines, 0) / np.maximum(cosines, 0).sum()
    expected = np.einsum("j,jnd->nd", weights, stacked)
    np.testing.assert_allclose(made.prompt.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert (made.role, made.task, made.sample) == ("mixture", TARGET, 13)
    assert made.dev_score is None
    assert made.made_from is not None
    assert set(made.source_tasks or []) == set(SOURCES)
    parts = {part["task"]: part for part in made.made_from["sources"]}
    assert set(parts) == set(SOURCES)
    for task, weight in zip(SOURCES, weights, strict=True):
        source = store / f"{task}.safetensors"
        assert parts[task]["weight"] == pytest.approx(weight)
        assert parts[task]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
        assert f"{TARGET}_mixture\t{task}\t{weight:.4f}\n" in said


def test_each_seed_of_a_target_gets_a_mixture_of_the_sources_of_its_seed(store, tmp_path):
    """Of a source without that seed the best one takes part."""
    target = load_prompt(store / f"{TARGET}.safetensors")
    source = load_prompt(store / f"{SOURCES[0]}.safetensors")
    source = replace(source, prompt=2 * target.prompt)  # alike, so that it has a weight
    own = replace(source, prompt=3 * target.prompt, name="own", init_seed=7, dev_score=0.0)
    seeds = [replace(target, name=f"target{seed}", init_seed=seed) for seed in (7, 8)]
    PromptStore(tmp_path / "targets").save(seeds)
    PromptStore(tmp_path / "sources").save([source, own])
    made = mix_prompts(
        str(tmp_path / "targets"), prompts=[str(tmp_path / "sources")], out=str(tmp_path / "out")
    )
    first, second = (load_prompt(path) for path in made)
    assert (first.init_seed, second.init_seed) == (7, 8)
    torch.testing.assert_close(first.prompt, own.prompt)
    torch.testing.assert_close(second.prompt, source.prompt)


def test_prompt_tuning_starts_each_task_from_its_own_mixture(
    store, tmp_path, backbone, fewshot_root
):
    words = ["vectors", "mix", str(store), f"--out={tmp_path / 'out'}"]
    assert offline.run([*words, "--prompts", str(store), "--sources", *SOURCES[:2]]) == 0
    made = {p.task: p for p in PromptStore(tmp_path / "out").load(names(tmp_path / "out"))}
    assert set(made) == set(TASKS)
    method = make_method(
        backbone("gpt2"), init=InitConfig("file", path=str(tmp_path / "out")), learning_rate=0.01
    )
    tasks = [TARGET, "emotion"]
    make_trainer(tmp_path / "run").fit(method, datamodule=make_data(fewshot_root, tasks, [13]))
    for task, init in zip(tasks, method.init, strict=True):
        assert init.equal(made[task].prompt)


def names(folder: Path) -> list[str]:
    """Names of the prompts of a store."""
    return [row["name"] for row in PromptStore(folder).index()]


def test_what_cannot_be_mixed_is_refused(store, tmp_path, backbone):
    file, out = str(store / f"{TARGET}.safetensors"), str(tmp_path / "out")
    given = {"prompts": [str(store)], "out": out}
    with pytest.raises(FileNotFoundError, match=r"of sample 13 in .* for trec: tune them"):
        mix_prompts(file, **given, sources=["trec", SOURCES[0]])
    with pytest.raises(FileNotFoundError, match=r"of sample 42 in .* for any task"):
        mix_prompts(file, **given, sample=42)
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        mix_prompts("nowhere.safetensors", **given)
    with pytest.raises(FileNotFoundError, match="no prompt file or folder nowhere"):
        mix_prompts(file, prompts=["nowhere"], out=out)
    other = make_store(tmp_path / "other", make_backbone("gpt2", seed=1))
    with pytest.raises(ValueError, match=r"do not combine: backbone .* with weights"):
        mix_prompts(file, prompts=[str(other)], out=out)
    prompt = load_prompt(store / f"{SOURCES[0]}.safetensors")
    short = replace(prompt, prompt=prompt.prompt[:3], init=prompt.init[:3])
    PromptStore(tmp_path / "short").save([short])
    with pytest.raises(ValueError, match=f"shape {TOKENS} x 32 and 3 x 32"):
        mix_prompts(file, prompts=[str(tmp_path / "short")], out=out)
    assert not Path(out).exists()
    mix_prompts(file, **given)
    with pytest.raises(ValueError, match="is there and is not overwritten"):
        mix_prompts(file, **given)
