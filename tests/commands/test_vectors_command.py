"""``vectors apply``, ``show`` and ``mix``: the arithmetic, which prompts take part, messages."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HIDDEN
from torch import Tensor

from prompt_lab.__main__ import main
from prompt_lab.commands.prompts import apply_vectors, mix_prompts, show_vectors
from prompt_lab.files.prompts import Prompt, PromptStore, load_prompt, save_prompt
from prompt_lab.files.vectors import find_vectors

pytestmark = pytest.mark.usefixtures("own_folder")

N = 4
TASKS = ("glue-qnli", "glue-mnli", "emotion")


def draw(*seeds: int) -> Tensor:
    """A prompt (N, HIDDEN) of normal numbers."""
    return torch.from_numpy(np.random.default_rng(seeds).normal(size=(N, HIDDEN))).float()


def tuned(task: str, sample: int | None = 13, seed: int | None = 0, **changes: Any) -> Prompt:
    """A prompt of a task; the init is that of the seed."""
    number = [ord(letter) for letter in task]
    digests = ("someone/some-model", "0123456789abcdef", "fedcba")
    tensors = (draw(*number, sample or 0, seed or 0), draw(seed or 0))
    made = Prompt(*tensors, f"{task}_{sample}_seed{seed}", *digests, task, sample, start="vocab")
    known = {"init_seed": seed, "dev_score": 0.5, "metric": "ACC", "max_input_length": 99}
    known |= {"decoding": "score", "labels": ["yes", "no"], "max_new_tokens": 7, "num_beams": 1}
    return replace(made, **known | changes)


def save(folder: str, *prompts: Prompt) -> str:
    """A prompt store, by its folder."""
    PromptStore(folder).save(prompts)
    return folder


def store(folder: str = "store", seeds: Iterable[int] = (0, 1)) -> str:
    """Prompts of three tasks, two samples and some seeds."""
    return save(folder, *(tuned(t, k, s) for t in TASKS for k in (13, 42) for s in seeds))


def written(folder: str = "out") -> dict[str, Prompt]:
    """The prompts of a store by name."""
    return {path.stem: load_prompt(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def in_float64(prompt: Prompt) -> np.ndarray:
    """Reference: the vector of a prompt by NumPy."""
    return prompt.prompt.numpy().astype(np.float64) - prompt.init.numpy().astype(np.float64)


# ---- apply: the arithmetic -----------------------------------------------------------------------


def test_the_expression_is_evaluated_for_every_sample_and_seed():
    """Reference: NumPy in float64, rounded once."""
    expression = "0.5 glue-qnli - 2 * glue-mnli"
    paths = apply_vectors(expression, prompts=[store()], out="out", scale=0.25)
    found = written()
    assert [path.stem for path in paths] == [
        f"0.5_glue-qnli_minus_2_glue-mnli_times_0.25_{sample}_seed{seed}"
        for sample in (13, 42)
        for seed in (0, 1)
    ]
    for prompt in found.values():
        sample, seed = prompt.sample, prompt.init_seed
        qnli, mnli = (tuned(task, sample, seed) for task in TASKS[:2])
        total = 0.5 * in_float64(qnli) - 2 * in_float64(mnli)
        expected = (qnli.init.numpy().astype(np.float64) + 0.25 * total).astype(np.float32)
        np.testing.assert_array_equal(prompt.prompt.numpy(), expected)
        assert prompt.init.equal(qnli.init)


def test_vectors_apply_to_every_different_init_of_another_store():
    """The cross-initialisation matrix: vectors of two seeds, on nine files of three inits."""
    save("vectors", tuned("emotion", 13, 0), tuned("emotion", 13, 1))
    save("inits", *(tuned(task, 13, seed) for task in TASKS for seed in (1, 2, 3)))
    paths = apply_vectors("emotion", prompts=["vectors"], out="out", init="inits")
    found = written()
    assert len(paths) == len(found) == 2 * 3
    for prompt in found.values():
        vector_seed = int(re.findall(r"emotion_13_seed(\d)_on", prompt.name)[0])
        vector = in_float64(tuned("emotion", 13, vector_seed))
        base = draw(prompt.init_seed or 0)
        assert prompt.init.equal(base)
        np.testing.assert_array_equal(
            prompt.prompt.numpy(), (base.numpy().astype(np.float64) + vector).astype(np.float32)
        )


def test_vectors_of_different_inits_combine_on_an_init_that_is_named():
    other = draw(99)
    save("store", tuned("emotion"), tuned("glue-qnli", init=other, start="normal"))
    sentence = (
        r"store/emotion_13_seed0.safetensors \(vocab\) and .*glue-qnli.* \(normal\) "
        "start from different initial prompts: name one to apply to with --init"
    )
    with pytest.raises(ValueError, match=sentence):
        apply_vectors("emotion + glue-qnli", prompts=["store"], out="out")
    assert not Path("out").exists()
    file = "store/emotion_13_seed0.safetensors"
    apply_vectors("emotion + glue-qnli", prompts=["store"], out="out", init=file)
    (found,) = written().values()
    total = in_float64(tuned("emotion")) + in_float64(tuned("glue-qnli", init=other))
    expected = (draw(0).numpy().astype(np.float64) + total).astype(np.float32)
    np.testing.assert_array_equal(found.prompt.numpy(), expected)


def test_of_a_file_that_was_made_to_start_from_the_prompt_itself_is_the_init():
    """As MetaPrompt and vectors apply write them: they say what to call the prompt."""
    start = tuned("", None, 7, name="prompt", role="meta", source_set="3 tasks")
    save("meta", start)
    apply_vectors(
        "emotion",
        prompts=[save("store", tuned("emotion"))],
        out="out",
        init="meta/prompt.safetensors",
    )
    (found,) = written().values()
    assert found.init.equal(start.prompt)
    assert (found.start, found.start_of) == ("meta", "3 tasks")
    assert (found.made_from or {})["init"]["tensor"] == "prompt"


# ---- apply: which prompts take part --------------------------------------------------------------


def test_samples_and_seeds_that_lack_a_task_are_left_out_and_named(capsys):
    save(
        "store", tuned("emotion"), tuned("glue-qnli"), tuned("emotion", 42), tuned("glue-mnli", 87)
    )
    apply_vectors("emotion + glue-qnli", prompts=["store"], out="out")
    assert list(written()) == ["emotion_plus_glue-qnli_13_seed0"]
    assert capsys.readouterr().err == "prompt-lab: left out: sample 42 seed 0 lacks glue-qnli\n"
    sentence = "no sample and seed has all tasks: emotion has sample 13 seed 0, sample 42 seed 0; "
    with pytest.raises(ValueError, match=f"{sentence}glue-mnli has sample 87 seed 0"):
        apply_vectors("emotion + glue-mnli", prompts=["store"], out="other")


def test_files_that_apply_wrote_are_no_vectors():
    apply_vectors("- emotion", prompts=[store()], out="store")
    found = find_vectors(["store"])
    assert all("minus" not in str(path) for paths in found.values() for path in paths.values())
    apply_vectors("- emotion", prompts=["store"], out="out")
    with pytest.raises(ValueError, match="no tuned prompt of a task in out: give stores of fits"):
        show_vectors(["out"])


# ---- apply: what is written ----------------------------------------------------------------------


def test_a_written_file_tells_where_it_comes_from():
    expression = "0.5 emotion\n  + 0.5 glue-qnli"
    apply_vectors(expression, prompts=[store()], out="out", scale=0.5)
    found = load_prompt("out/0.5_emotion_plus_0.5_glue-qnli_times_0.5_42_seed1.safetensors")

    def file(name: str) -> dict[str, str]:
        """What is said of a file."""
        path = f"store/{name}.safetensors"
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return {"name": name, "path": path, "sha256": digest}

    assert found.made_from == {
        "expression": "0.5 emotion + 0.5 glue-qnli",
        "scale": 0.5,
        "vectors": [
            {"task": task, "coefficient": 0.5, **file(f"{task}_42_seed1")}
            for task in ("emotion", "glue-qnli")
        ],
        "init": {"tensor": "init", **file("emotion_42_seed1")},
    }
    assert found.role == "sum"
    assert found.source_tasks == ["emotion", "glue-qnli"]
    assert (found.start, found.sample, found.init_seed) == ("vocab", 42, 1)
    assert (found.task, found.dev_score, found.steps) == ("", None, None)
    assert found.backbone_digest == "0123456789abcdef"


def answers(name: str) -> tuple[Any, ...]:
    """How a written prompt answers."""
    p = load_prompt(f"{name}/{name}.safetensors")
    return p.task, p.labels, p.decoding, p.max_new_tokens, p.metric, p.task_prefix


def test_a_written_prompt_answers_as_its_tasks_where_they_agree():
    other = {"labels": ["a", "b"], "metric": "EM", "max_new_tokens": 9, "task_prefix": True}
    save("store", tuned("emotion", None, None, task_prefix=True), tuned("b", None, None, **other))
    yes_no = ["yes", "no"]
    for expression, task, name, expected in (
        ("emotion", None, "emotion", ("emotion", yes_no, "score", 7, "ACC", True)),
        ("emotion + b", None, "emotion_plus_b", ("", None, "score", None, "", False)),
        ("b + emotion", "b", "b_plus_emotion", ("b", ["a", "b"], "score", 9, "EM", True)),
        ("2 * b", "rte", "2_b", ("rte", None, "score", 9, "", True)),
        ("3 * b", "", "3_b", ("", ["a", "b"], "score", 9, "EM", False)),
    ):
        apply_vectors(expression, prompts=["store"], out=name, task=task)
        assert answers(name) == expected


def test_sums_answer_by_the_template_of_their_tasks_and_other_templates_are_told(
    capsys: pytest.CaptureFixture[str],
):
    chat = {"template": "chat", "system": "Be brief."}
    save(
        "store",
        *(tuned(task, None, None, **chat) for task in ("a", "b")),
        tuned("c", None, None, template="chat"),
    )
    for expression, task, expected, told in (
        ("a + b", None, ("chat", "Be brief."), False),
        ("a + c", None, ("plain", None), True),
        ("a - c", "c", ("chat", None), True),
    ):
        (path,) = apply_vectors(expression, prompts=["store"], out="out", task=task)
        found = load_prompt(path)
        assert (found.template, found.system) == expected
        assert ("with different templates or system texts" in capsys.readouterr().err) == told


def test_names_of_files_are_safe_and_not_too_long():
    odd = [f"{at}/odd name" for at in range(40)]
    save("store", *(tuned(task, name=f"p{at}") for at, task in enumerate(odd)))
    quoted = [f"'{name}'" for name in odd]
    short, long = " - ".join(quoted[:2]), " + ".join(quoted)
    names = [apply_vectors(text, prompts=["store"], out="out")[0].stem for text in (short, long)]
    assert names[0] == "0-odd-name_minus_1-odd-name_13_seed0"
    assert all(re.fullmatch(r"[\w.-]{1,200}", name) for name in names)
    apply_vectors(f"1e20 * {quoted[0]}", prompts=["store"], out="out", scale=-1)
    assert "1e20_0-odd-name_times_-1_13_seed0" in written()


def test_nothing_is_overwritten_and_nothing_written_where_one_file_is_there():
    apply_vectors("emotion", prompts=[store(seeds=[1])], out="out")
    store(seeds=[0, 1])
    before = written()
    with pytest.raises(ValueError, match=r"emotion_13_seed1.safetensors is there and is not over"):
        apply_vectors("emotion", prompts=["store"], out="out")
    assert list(written()) == list(before)


# ---- apply: what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"backbone": "b", "backbone_digest": "99"}, "backbone 'someone/some-model' with weights"),
        ({"tokenizer_digest": "77"}, "tokenizer fedcba and 77"),
        (
            {"prompt": torch.ones(3, HIDDEN), "init": torch.ones(3, HIDDEN)},
            "shape 4 x 32 and 3 x 32",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_refused_naming_both(change, sentence):
    save("store", tuned("emotion"), tuned("glue-qnli", **change))
    both = r"store/emotion_13_seed0.safetensors and store/glue-qnli_13_seed0.safetensors do not"
    with pytest.raises(ValueError, match=f"{both} combine: {sentence}"):
        apply_vectors("emotion + glue-qnli", prompts=["store"], out="out")
    with pytest.raises(ValueError, match=both):
        show_vectors(["store"])
    init = "store/glue-qnli_13_seed0.safetensors"
    with pytest.raises(ValueError, match=f"{both} combine: {sentence}"):
        apply_vectors("emotion", prompts=["store"], out="out", init=init)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("glue-qnly",), "no prompt of task 'glue-qnly' in store; did you mean glue-qnli?"),
        (("zzz",), "'zzz' in store; there are: emotion, glue-mnli, glue-qnli"),
        (("glue-qnli-glue-mnli",), "a minus needs spaces around it: glue-qnli - ..."),
        (
            ("emotion / 2",),
            "expression 'emotion / 2' cannot be read from '/ 2' on: give names with",
        ),
        (("mean(emotion)",), "cannot be read from '(emotion)' on: give names"),
        (("emotion", "--scale", "1e999"), "scale is inf: give a finite number"),
        (("emotion", "--out", "file"), "out is the file file: give a folder"),
        (("emotion", "--out", "foreign"), "damaged or not a safetensors file"),
        (("emotion", "--init", "file"), "file: damaged or not a safetensors file"),
    ],
)
def test_bad_input_is_one_sentence_and_status_1(words, sentence, capsys):
    store()
    Path("file").write_text("text")
    Path("foreign").mkdir()
    Path("foreign/x.safetensors").write_text("text")
    given = ["vectors", "apply", words[0], "--prompts", "store", "--out", "out", *words[1:]]
    assert main(given) == 1
    err = capsys.readouterr().err
    assert err.startswith("prompt-lab: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert not Path("out").exists()


# ---- show ----------------------------------------------------------------------------------------


def test_show_lists_norms_and_cosines(capsys):
    """Reference: NumPy; the mean is over the other tasks of the same sample and seed."""
    store()
    save("store", tuned("emotion", 87))
    assert main(["vectors", "show", "store"]) == 0
    head, *rows = (text.split() for text in capsys.readouterr().out.splitlines())
    assert head == ["task", "sample", "seed", "vector", "init", "ratio", "cosine", "to", "others"]
    places = [(k, s) for k in (13, 42) for s in (0, 1)]
    expected = [(t, k, s) for t in sorted(TASKS) for k, s in places + [(87, 0)] * (t == "emotion")]
    assert [(task, int(k), int(s)) for task, k, s, *_ in rows] == expected
    for task, sample, seed, *cells in rows:
        own = {t: in_float64(tuned(t, int(sample), int(seed))).ravel() for t in TASKS}
        vector = own.pop(task)
        norm, start = np.linalg.norm(vector), np.linalg.norm(draw(int(seed)).numpy())
        mean = np.mean(list(own.values()), 0)
        cosine = vector @ mean / norm / np.linalg.norm(mean)
        if sample == "87":
            assert cells.pop() == "-"
        numbers = [norm, start, norm / start, cosine][: len(cells)]
        np.testing.assert_allclose([float(cell) for cell in cells], numbers, rtol=1e-3)


# ---- mix -----------------------------------------------------------------------------------------


def targets(*seeds: int) -> list[str]:
    """Files of prompts of a target task, which is positively similar to what ``store`` holds."""
    alike = [tuned(task, 13).prompt for task in TASKS]
    made = [tuned("trec", 13, s, prompt=sum(alike) + draw(5, s)) for s in seeds]  # pyright: ignore
    save("targets", *made)
    return [f"targets/{one.name}.safetensors" for one in made]


def test_a_mixture_is_the_sum_by_cosines_of_mean_rows(capsys):
    """Reference: NumPy."""
    (file,) = targets(0)
    (path,) = mix_prompts(file, prompts=[store()], out="out")
    said = capsys.readouterr().out
    made, target = load_prompt(path), load_prompt(file)
    stacked = np.stack([tuned(task).prompt.double().numpy() for task in sorted(TASKS)])
    means, own = stacked.mean(1), target.prompt.double().numpy().mean(0)
    cosines = means @ own / np.linalg.norm(means, axis=1) / np.linalg.norm(own)
    weights = np.maximum(cosines, 0) / np.maximum(cosines, 0).sum()
    expected = np.einsum("j,jnd->nd", weights, stacked)
    np.testing.assert_allclose(made.prompt.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert made.init.equal(made.prompt)
    assert (made.role, made.task, made.sample, made.init_seed) == ("mixture", "trec", 13, 0)
    assert (made.start, made.dev_score, made.steps, made.code) == ("", None, None, None)
    assert (made.labels, made.max_new_tokens, made.metric) == (["yes", "no"], 7, "ACC")
    assert made.source_tasks == sorted(TASKS)
    parts = (made.made_from or {})["sources"]
    for task, weight, part in zip(sorted(TASKS), weights, parts, strict=True):
        content = Path(f"store/{task}_13_seed0.safetensors").read_bytes()
        assert part["weight"] == pytest.approx(weight)
        assert (part["task"], part["sha256"]) == (task, hashlib.sha256(content).hexdigest())
        assert f"trec_13_seed0_mixture\t{task}\t{weight:.4f}\n" in said
    assert (made.made_from or {})["target"]["name"] == target.name


def test_each_seed_of_a_target_gets_a_mixture_of_the_sources_of_its_seed():
    """Of a source without that seed the best one takes part."""
    targets(7, 8)
    prompts = {
        seed: load_prompt(f"targets/trec_13_seed{seed}.safetensors").prompt for seed in (7, 8)
    }
    own = tuned("emotion", 13, 7, prompt=3 * prompts[7], dev_score=0.0)
    save("sources", tuned("emotion", 13, 0, prompt=2 * prompts[7]), own)
    first, second = map(load_prompt, mix_prompts("targets", prompts=["sources"], out="out"))
    assert (first.init_seed, second.init_seed) == (7, 8)
    torch.testing.assert_close(first.prompt, 3 * prompts[7])
    torch.testing.assert_close(second.prompt, 2 * prompts[7])


def test_what_cannot_be_mixed_is_refused(capsys):
    (file,) = targets(0)
    store()
    save("others", tuned("emotion", backbone_digest="99"))
    save("short", tuned("emotion", prompt=torch.ones(3, HIDDEN), init=torch.ones(3, HIDDEN)))
    save("against", tuned("emotion", prompt=-load_prompt(file).prompt))
    save_prompt("none.safetensors", tuned("", name="none"))
    for words, sentence in (
        ((file, "--sources", "trec"), "no source prompt of sample 13 in store for trec: tune them"),
        ((file, "--sample", "99"), "no source prompt of sample 99 in store for any task: tune"),
        ((file, "--prompts", "others"), "do not combine: backbone 'someone/some-model' with wei"),
        ((file, "--prompts", "short"), "do not combine: shape 4 x 32 and 3 x 32"),
        ((file, "--prompts", "against"), f"{file}: none of 1 source prompts has a positive simil"),
    ):
        given = ["vectors", "mix", words[0], "--prompts", "store", "--out", "out", *words[1:]]
        assert main(given) == 1
        assert sentence in capsys.readouterr().err
    assert not Path("out").exists()
    mix_prompts(file, prompts=["store"], out="out", sources=["emotion"])
    with pytest.raises(ValueError, match="is there and is not overwritten"):
        mix_prompts(file, prompts=["store"], out="out", sources=["emotion"])
