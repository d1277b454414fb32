"""The command ``prompt-lab vectors compare``: how alike prompts, and their vectors, are."""

from __future__ import annotations

from pathlib import Path


def compare_vectors(prompts: list[str], *, out: str) -> list[Path]:
    """Cosines of tuned prompts, and of task prompt vectors, between tasks and initial prompts.

    Writes report.md and report.html with similarities.csv (mean, standard deviation and number of
    pairs), norms.csv (norms of vectors and initial prompts, and their ratio), and four heat maps
    (PNG, SVG): prompts and vectors, from different initial prompts and from one and the same. An
    entry is the mean over all such pairs of few-shot samples in common; on the diagonal over pairs
    of two prompts of a task. Prints both tables.

    Of a grid the prompt of best dev score stands for its task, sample and seed. A prompt that is
    its own initial prompt has no vector, and is named and left out there.

    Args:
        prompts: prompt stores, folders of fits, prompt files or checkpoints, with tuned prompts of
            several tasks or seeds.
        out: folder for pictures and tables.

    Returns:
        The report.

    Raises:
        FileNotFoundError: a store that is not there.
        ValueError: stores without tuned prompts, prompts of different backbones or shapes, numbers
            that are not finite, or only one prompt of each sample.
        NotADirectoryError: ``out`` is a file.
    """
    from prompt_lab.analysis.report import markdown, write_report
    from prompt_lab.analysis.vectors import cosine_sections
    from prompt_lab.files.prompts import FoundPrompt
    from prompt_lab.files.vectors import check_compatible, find_vectors

    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file: name a folder")
    groups: dict[int | None, list[FoundPrompt]] = {}
    for (sample, _), own in find_vectors(prompts).items():
        groups.setdefault(sample, []).extend(own.values())
    check_compatible(*(found for own in groups.values() for found in own))
    if max(map(len, groups.values())) < 2:
        raise ValueError(
            f"only one tuned prompt of each sample in {', '.join(prompts)}: nothing to compare; "
            "tune several tasks, or several model.init_seed"
        )
    sections = cosine_sections(groups)
    files = write_report(sections, folder, "How alike prompts and vectors are")
    for section in sections:
        print(f"{section.title}\n\n{section.legend}\n\n{markdown(section.shown)}\n")
    return files[:2]
