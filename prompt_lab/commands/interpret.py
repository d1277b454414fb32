"""The command ``prompt-lab interpret``: what tuned prompts say, as a report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def interpret_command(
    prompts: list[str],
    *,
    out: str,
    top: int = 5,
    measure: Literal["cosine", "l2", "dot"] = "cosine",
    compare: Literal["rows", "mean"] = "rows",
    transfer: list[str] | None = None,
    backbone: str | None = None,
    all_rows: bool = False,
) -> list[Path]:
    """Report what prompts say: nearest tokens, drift, norms, spread of repeated runs, distances.

    Writes report.md, report.html, tables as CSV, and figures as PNG and SVG. Special tokens, and
    rows of the embedding table that no token has, are left out unless --all_rows is given. Of a
    grid in a folder, the prompt with the best dev score stands for each task, sample and seeds;
    files that are named are all read. With --transfer also how well prompts serve other tasks, and
    whether near ones do so better: a rank correlation with a permutation test. The model is loaded
    for its embeddings and its tokenizer; nothing is run.

    Args:
        prompts: prompt files, prompt stores, folders of fits, PEFT folders or checkpoints; of one
            backbone.
        out: folder for the report.
        top: how many nearest tokens of each row.
        measure: what near means: cosine, l2 (Euclidean distance) or dot (inner product).
        compare: what distances between prompts are of. rows - all rows (Frobenius norm of the
            difference), which needs prompts of one length; mean - their mean rows.
        transfer: measured zero-shot transfer of these prompts: results.csv files, or folders with
            such, of VectorArithmetic with each task as an expression, evaluate_on all and scales 1;
            or CSV files with the columns source (a task, or a prompt that is given), target (a
            task), score, and no_prompt (the score of the target without any prompt). Several lines
            of a pair are averaged.
        backbone: hub id or folder of the model, where it is not at the place that the prompts name.
        all_rows: also find special tokens and rows that no token has.

    Raises:
        FileNotFoundError, ValueError, NotADirectoryError: what lacks or is wrong, in a sentence.
    """
    from prompt_lab.analysis.interpretation import find_tuned, prompt_points, read_transfer
    from prompt_lab.analysis.interpretation_sections import interpret_prompts
    from prompt_lab.analysis.sections import check_folder, markdown, write_report
    from prompt_lab.core.backbone import Backbone

    folder = check_folder(out)
    if top < 1:
        raise ValueError(f"--top is {top}: give 1 or more")
    tuned = find_tuned(prompts)
    prompt_points(tuned, compare)  # refuses before the model is loaded
    gains = None if transfer is None else read_transfer(transfer, tuned)
    model = Backbone.load(backbone or tuned["tuned"].iloc[0].backbone)
    sections = interpret_prompts(tuned, model, top, measure, compare, gains, all_rows)
    files = write_report(sections, folder, "What the prompts say")
    for section in sections[:-1]:  # the tokens are many
        print(f"{section.title}\n\n{section.legend}\n\n{markdown(section.shown)}\n")
    return files
