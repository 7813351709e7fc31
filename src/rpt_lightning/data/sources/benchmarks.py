"""The benchmarks by name.

Each entry gives the dataset's place on the Hugging Face hub and its field names, as its dataset card gave
them in November 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rpt_lightning.data.sources.questions import (
    HuggingFaceQuestions,
    JsonlQuestions,
    QuestionFields,
    QuestionSource,
)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A dataset of questions."""

    hub_id: str
    split: str
    fields: QuestionFields


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark(hub_id="HuggingFaceH4/aime_2024", split="train", fields=QuestionFields(id="id")),
    "aime25": Benchmark(hub_id="math-ai/aime25", split="test", fields=QuestionFields(id="id")),
    "math500": Benchmark(
        hub_id="HuggingFaceH4/MATH-500",
        split="test",
        fields=QuestionFields(id="unique_id", category="subject"),
    ),
    "mmlu_pro": Benchmark(
        hub_id="TIGER-Lab/MMLU-Pro",
        split="test",
        fields=QuestionFields(
            question="question", choices="options", answer="answer", category="category", id="question_id"
        ),
    ),
    "supergpqa": Benchmark(
        hub_id="m-a-p/SuperGPQA",
        split="train",  # its only one
        # "answer" holds the right choice's text.
        fields=QuestionFields(
            question="question", choices="options", answer="answer_letter", category="discipline", id="uuid"
        ),
    ),
}


def benchmark_source(name: str, *, file: Path | None = None, revision: str | None = None) -> QuestionSource:
    """Return a benchmark from the hub, or from a local JSONL file that holds the rows of its dataset.

    Raises ValueError if ``name`` is not a benchmark.
    """
    if name not in BENCHMARKS:
        raise ValueError(
            f"--benchmark {name!r}: the benchmarks are {', '.join(BENCHMARKS)}; "
            "use --questions for questions of your own"
        )
    benchmark = BENCHMARKS[name]
    if file is not None:
        return JsonlQuestions(str(file), benchmark.fields)
    return HuggingFaceQuestions(benchmark.hub_id, benchmark.split, benchmark.fields, revision=revision)
