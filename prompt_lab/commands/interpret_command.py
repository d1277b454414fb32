"""The command `prompt-lab interpret`: what tuned prompts say, as a report.

The figures of "Interpreting Prompt-Tuning Across SuperGLUE Tasks" (Dayton, O'Rahilly and Werner)
and what they leave out: nearest tokens of each row with the place of its initial token, drift and
norms, the spread of repeated runs, distances between prompts, and, with measured transfer, the rank
correlation of the two. `interpretation` computes; modules `interpret_*` find prompts,
make tokens readable, read transfer, and lay all of it out.

The model is loaded for its embeddings, its tokenizer and its digest; nothing is run. Left out:
transfer itself, which `VectorArithmetic` measures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from prompt_lab.analysis.interpret_figures import draw_figures
from prompt_lab.analysis.interpret_prompts import find_tuned, prompt_distances, start_notes
from prompt_lab.analysis.interpret_report import (
    about,
    picture_blocks,
    summary_blocks,
    token_blocks,
    write_tables,
)
from prompt_lab.analysis.interpret_tokens import read_prompts, read_vocabulary
from prompt_lab.analysis.interpret_transfer import compare_transfer, read_transfer
from prompt_lab.analysis.report_blocks import as_html, as_markdown, as_text
from prompt_lab.files.tensors import write_atomically


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
    format: Literal["html", "markdown"] = "html",
) -> list[Path]:
    """Report what prompts say: nearest tokens, drift, norms, spread of repeated runs, distances.

    Writes a report (report.html or report.md), tables as CSV, and figures as PNG and SVG. Special
    tokens, and rows of the embedding table that no token has, are left out unless --all_rows is
    given. Of a grid in a folder, the prompt with the best dev score stands for each task, sample
    and seeds; files that are named are all read. With --transfer also how well prompts serve other
    tasks, and whether near ones do so better: a rank correlation with a permutation test.

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
        format: html or markdown.

    Returns:
        The files.

    Raises:
        FileNotFoundError: a prompt file, folder, table or result file that is not there.
        ValueError: no prompts, prompts of several backbones, prompts of several lengths where rows
            are compared, numbers that are not finite, ``top`` out of range, or transfer that cannot
            be read.
        NotADirectoryError: ``out`` is a file.
    """
    from prompt_lab.core.backbone import Backbone

    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file: name a folder")
    if top < 1:
        raise ValueError(f"--top is {top}: give 1 or more")
    tuned, notes = find_tuned(prompts)
    distances = prompt_distances(tuned, compare)
    table = None if transfer is None else read_transfer(transfer, tuned)
    model = Backbone.load(backbone or tuned[0].prompt.backbone)
    vocabulary = read_vocabulary(model, all_rows)
    readings = read_prompts(tuned, model, vocabulary, top, measure)
    found = None if table is None else compare_transfer(table, tuned, distances)
    files = [
        *write_tables(folder, readings, vocabulary, distances, found),
        *draw_figures(folder, readings, vocabulary, distances, found, compare),
    ]
    intro = [about(model, readings, measure), vocabulary.note, *notes, *start_notes(tuned)]
    summary = list(summary_blocks(intro, readings, vocabulary, distances, compare, found))
    blocks = [*summary, *picture_blocks(files), *token_blocks(readings, vocabulary)]
    name, text = "report.html", as_html(blocks, "What the prompts say")
    if format == "markdown":
        name, text = "report.md", as_markdown(blocks)
    write_atomically(folder / name, text.encode())
    print(as_text(summary))
    return [folder / name, *files]
