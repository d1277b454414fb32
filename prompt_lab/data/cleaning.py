"""Cleaning of texts, as the builders of the CrossFit gym do it."""

from __future__ import annotations


def clean(text: str) -> str:
    r"""The text in one line: tabs, line ends and a written ``\n`` are spaces, and never two."""
    return " ".join(text.replace("\\n", " ").split())


def one_line(text: str) -> str:
    """The text with a space for each line feed."""
    return text.replace("\n", " ")
