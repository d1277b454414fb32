"""What the tests share: tiny random models of every architecture, a tokenizer, few-shot files.

Everything is made here, seeded, without files from outside and without network. Weights are drawn
wider than usual, so that gradients are far above rounding.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models run faster on one thread

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.files.prompts import Prompt, PromptStore
from prompt_lab.methods.prompt_tuning import PromptTuning

if TYPE_CHECKING:
    from prompt_lab.core.backbone import Backbone

CONFIGS = Path(__file__).parents[1] / "configs"
HIDDEN = 32
POSITIONS = 128
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

TASKS = {
    "glue-sst2": (16, ("negative", "positive")),  # ACC
    "glue-cola": (16, ("unacceptable", "acceptable")),  # Matthew-Correlation
    "emotion": (16, ("sadness", "joy", "love", "anger", "fear", "surprise")),  # Classification-F1
    "e2e_nlg_cleaned": (32, None),  # Rouge-L
}
SAMPLES = (13, 42)

_SPECIALS = {
    "t5": {"pad_token": PAD, "eos_token": EOS},
    "mt5": {"pad_token": PAD, "eos_token": EOS},
    "bart": {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS},
    "gpt2": {"bos_token": EOS, "eos_token": EOS},  # no padding token, as GPT-2's own tokenizer
    "bloom": {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS},
    "llama": {"bos_token": BOS, "eos_token": EOS},
    "qwen2": {"pad_token": PAD, "eos_token": EOS},  # no beginning token
    "qwen2_window": {"pad_token": PAD, "eos_token": EOS},  # one layer sees 8 positions
}
KINDS = tuple(_SPECIALS)
ENCODER_DECODER = ("t5", "mt5", "bart")
DECODER_ONLY = ("gpt2", "bloom", "llama", "qwen2", "qwen2_window")
_TEMPLATES = {"t5": f"$A {EOS}", "mt5": f"$A {EOS}", "bart": f"{BOS} $A {EOS}"}
_TEMPLATES |= {"llama": f"{BOS} $A"}  # the others add nothing

_CORPUS = [
    "the small red house stands on the hill",
    "a dog and a cat ran over the field",
    "yes no maybe positive negative acceptable unacceptable",
    "she likes to read long books by the sea",
]


@cache
def _vocabulary() -> str:
    """A byte-level BPE of ASCII and a hundred merges, as the tokenizers library stores it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=[PAD, BOS, EOS, UNK],
        initial_alphabet=["Ġ", *map(chr, range(33, 127))],  # a space, and what can be seen
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def make_tokenizer(kind: str) -> Any:
    """The tokenizer of a kind of model: same vocabulary, special tokens as that kind has them."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(_vocabulary())
    if kind in _TEMPLATES:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=_TEMPLATES[kind], special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        **_SPECIALS[kind],
    )


def _config(kind: str, vocab_size: int) -> Any:
    """Two layers of four heads over 32 dimensions, in each architecture's own words."""
    import transformers as hf

    t5 = {"d_model": HIDDEN, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2}
    t5 |= {"decoder_start_token_id": PAD_ID, "pad_token_id": PAD_ID}
    bart = {f"{side}_layers": 2 for side in ("encoder", "decoder")}
    bart |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    bart |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
    llama = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
    llama |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama |= {"max_position_embeddings": POSITIONS}
    makers: dict[str, Callable[..., Any]] = {
        "t5": lambda **common: hf.T5Config(**t5, **common),
        "mt5": lambda **common: hf.MT5Config(**t5, feed_forward_proj="gated-gelu", **common),
        "bart": lambda **common: hf.BartConfig(
            d_model=HIDDEN,
            max_position_embeddings=POSITIONS,
            pad_token_id=PAD_ID,
            decoder_start_token_id=EOS_ID,
            forced_eos_token_id=None,
            scale_embedding=True,
            **bart,
            **common,
        ),
        "gpt2": lambda **common: hf.GPT2Config(
            n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=POSITIONS, **common
        ),
        "bloom": lambda **common: hf.BloomConfig(
            hidden_size=HIDDEN, n_layer=2, n_head=4, pad_token_id=PAD_ID, **common
        ),
        "llama": lambda **common: hf.LlamaConfig(**llama, **common),
        "qwen2": lambda **common: hf.Qwen2Config(**llama, **common),
        "qwen2_window": lambda **common: hf.Qwen2Config(
            use_sliding_window=True, sliding_window=8, max_window_layers=1, **llama, **common
        ),
    }
    bos = EOS_ID if kind == "gpt2" else BOS_ID
    return makers[kind](vocab_size=vocab_size, bos_token_id=bos, eos_token_id=EOS_ID)


def make_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model; matrices are normal with standard deviation 0.3."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    maker = AutoModelForSeq2SeqLM if kind in ENCODER_DECODER else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = maker.from_config(_config(kind, len(make_tokenizer(kind))))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def make_backbone(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Backbone:
    """A new backbone; for tests that change it. Others take the ``backbone`` fixture."""
    from prompt_lab.core.backbone import Backbone

    return Backbone(make_model(kind, dtype, seed), make_tokenizer(kind), f"tiny-{kind}")


@pytest.fixture(scope="session")
def backbone() -> Callable[..., Backbone]:
    """Factory ``backbone(kind, dtype)`` of tiny backbones, each made once; do not change them."""
    return cache(make_backbone)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Factory ``model_folder(kind)`` of folders that hold a tiny model and its tokenizer."""

    @cache
    def save(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(f"model-{kind}")
        make_model(kind).save_pretrained(folder)
        make_tokenizer(kind).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def fewshot_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in CrossFit's layout: the four ``TASKS`` x two ``SAMPLES``, 12 rows a split.

    The open task has a second reference in every other row.
    """
    root = tmp_path_factory.mktemp("fewshot")
    for task, (shots, labels) in TASKS.items():
        folder = root / task
        folder.mkdir()
        for sample in SAMPLES:
            for split in ("train", "dev", "test"):
                lines = [_line(task, labels, sample, split, row) for row in range(12)]
                path = folder / f"{task}_{shots}_{sample}_{split}.tsv"
                path.write_text("".join(lines), encoding="utf-8")
    return root


def _line(task: str, labels: tuple[str, ...] | None, sample: int, split: str, row: int) -> str:
    """One line of a few-shot file; rows differ in length, and no two are the same."""
    words = " ".join(_CORPUS[row % 4].split()[: 2 + row % 5])
    text = f"{task.split('-')[-1]} {split} {sample} {row}: {words}"
    if labels is not None:
        return f"{text}\t{labels[row % len(labels)]}\n"
    more = f"\tthe {words}" if row % 2 else ""
    return f"{text}\t{words}{more}\n"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real few-shot files and models; skips where there is none."""
    folder = os.environ.get("PROMPT_LAB_TEST_DATA")
    if not folder:
        pytest.skip("PROMPT_LAB_TEST_DATA is not set: it names a folder with crossfit/ and models/")
    return Path(folder)


class InFolder(Callback):
    """Lets a method write into a folder, as the command line does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.run_dir = self.folder


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, without variables that name a run, as from a shell."""
    from prompt_lab.commands.fit import RUN_DIR_VARIABLE

    monkeypatch.chdir(tmp_path)
    for name in (RUN_DIR_VARIABLE, "WANDB_RUN_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "")  # so that what a command sets is taken back
        monkeypatch.delenv(name)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Run a test on two threads, and restore the number after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def result_line(**given: Any) -> dict[str, Any]:
    """A line of ``results.csv``, of a tuned prompt unless other cells are given."""
    cells = {
        "fit_id": "a1",
        "method": "PromptTuning",
        "variant": "tuned",
        "stage": "test",
        "backbone": "t5-base",
        "sample": 100,
        "shots": 16,
        "init_seed": 0,
        "order_seed": 0,
        "start": "vocab",
        "start_seed": 0,
        "num_virtual_tokens": 100,
        "optimizer": "adamw",
        "learning_rate": 0.3,
        "batch_size": 8,
        "decoding": "score",
        "metric": "ACC",
        "metric_variant": "crossfit",
        "dev": 0.5,
        "test": 0.5,
        "status": "finished",
        "version": "0.1.0",
    }
    return cells | given


def make_trainer(run_dir: Path, steps: int = 6, every: int = 3, **settings: Any) -> Trainer:
    """A trainer with the settings of the command line, without its outputs."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "max_steps": steps,
        "val_check_interval": every,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "default_root_dir": run_dir,
    }
    settings["callbacks"] = [InFolder(run_dir), *settings.get("callbacks", [])]
    return Trainer(**{**defaults, **settings})


def make_method(backbone: Backbone | None = None, **settings: Any) -> PromptTuning:
    """A method on a backbone that is already loaded."""
    given = {"num_virtual_tokens": 5, "learning_rate": 0.03, "batch_size": 4, **settings}
    method = PromptTuning(**given)
    method.backbone = backbone
    return method


def make_data(root: Path, tasks: list[str], samples: list[int]) -> CrossFitDataModule:
    return CrossFitDataModule(tasks, root=str(root), samples=samples)


def make_store(folder: Path, model: Backbone, tasks: list[str] | None = None) -> Path:
    """A store with a prompt of every task, and a worse one of the first."""
    tasks = tasks or ["glue-sst2", "glue-cola", "e2e_nlg_cleaned", "emotion"]
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for name, task, score in [*((t, t, 0.5) for t in tasks), ("worse", tasks[0], 0.1)]:
        drawn = torch.randn(5, model.hidden_size, generator=generator) * 0.3
        prompts.append(
            Prompt(
                prompt=drawn,
                init=drawn,
                name=name,
                backbone=model.name,
                backbone_digest=model.digest,
                tokenizer_digest=model.tokenizer_digest,
                task=task,
                sample=13,
                dev_score=score,
            )
        )
    PromptStore(folder).save(prompts)
    return folder


def word_backbone() -> Backbone:
    """A decoder whose tokenizer knows few words, and one token for all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from prompt_lab.core.backbone import Backbone

    words = ["<unk>", EOS, "yes", "no", "the", "dog", "cat", "small"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token=EOS)
    model = make_model("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    return Backbone(model, tokenizer, "words")


@pytest.fixture(scope="session")
def smollm2(test_data: Path) -> str:
    """The folder of SmolLM2-135M-Instruct in the user's cache, made where it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "prompt_lab" / "smollm2-135m-instruct"
    if not folder.is_dir():
        draft = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        words = [sys.executable, str(test_data / "models" / "get_smollm2"), str(draft)]
        try:
            made = subprocess.run(words, capture_output=True, text=True, timeout=240)
            if made.returncode:
                pytest.skip(f"SmolLM2 cannot be made: {made.stderr.strip()[-300:]}")
            draft.rename(folder)
        except (OSError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"SmolLM2 cannot be made: {error}")
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return str(folder)
