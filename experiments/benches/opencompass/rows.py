"""What the rows of the benchmarks' own files must hold."""

from __future__ import annotations

from experiments.benches.opencompass.columns import Column, filled_text, one_of, text, texts

# Tasks whose rows name all classes.
CLASSIFICATION = ("trec", "lsht")

# LongBench v2.
DIFFICULTIES = ("easy", "hard")
LENGTHS = ("short", "medium", "long")
CHOICES = ("A", "B", "C", "D")
COLUMNS = (
    filled_text("question"),
    filled_text("context"),
    one_of("answer", *CHOICES),
    *(text(f"choice_{letter}") for letter in CHOICES),
    one_of("difficulty", *DIFFICULTIES),
    one_of("length", *LENGTHS),
)


def columns_of(task: str) -> tuple[Column, ...]:
    """What a task's rows must hold: a document, its question (or none) and the right answers."""
    columns = (text("input"), filled_text("context"), texts("answers"))
    return (*columns, texts("all_classes")) if task in CLASSIFICATION else columns
