"""prompt_lab: soft prompts on frozen language models.

Names are imported when first used, so that ``import prompt_lab`` and ``--help`` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AdapterSubspace": "prompt_lab.methods.adapter_subspace",
    "AdapterTuning": "prompt_lab.methods.adapter_subspace",
    "Attempt": "prompt_lab.methods.attempt",
    "Backbone": "prompt_lab.core.backbone",
    "CrossFitDataModule": "prompt_lab.data.datamodule",
    "FineTuning": "prompt_lab.methods.fine_tuning",
    "IntrinsicSubspace": "prompt_lab.methods.intrinsic_subspace",
    "MetaPrompt": "prompt_lab.methods.meta_prompt",
    "Prompt": "prompt_lab.files.prompts",
    "PromptDataModule": "prompt_lab.data.datamodule",
    "PromptMethod": "prompt_lab.methods.method",
    "PromptStore": "prompt_lab.files.prompts",
    "PromptTuning": "prompt_lab.methods.prompt_tuning",
    "RowsDataModule": "prompt_lab.data.datamodule",
    "VectorArithmetic": "prompt_lab.methods.vector_arithmetic",
    "label_scores": "prompt_lab.core.prediction",
    "load_prompt": "prompt_lab.files.prompts",
    "predict": "prompt_lab.core.prediction",
    "save_prompt": "prompt_lab.files.prompts",
    "vocabulary_prompt": "prompt_lab.methods.starts",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'prompt_lab' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
