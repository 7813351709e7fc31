"""Reasoning patterns: the shares of texts that contain a keyword from one of six groups.

This is RPT's analysis of reasoning patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rpt_lightning.evaluation.tables.stages import Rate
from rpt_lightning.metrics.interval import clustered_interval

PATTERNS: dict[str, tuple[str, ...]] = {
    "transition": ("alternatively", "think differently"),
    "reflection": ("wait", "initial answer", "original answer", "looking back", "thought process"),
    "breakdown": ("break down", "break this down"),
    "hypothesis": ("probably", "something like"),
    "divergent": (
        "etc.",
        "or something",
        "either",
        "sometimes it refers",
        "otherwise",
        "exploring",
        "options",
    ),
    "deduction": ("summarize", "conclusion", "conclude", "finally", "logically", "consequently"),
}
"""The paper's keywords. A text may show several patterns or none, so the shares do not add up to 1."""


def _expression(keywords: Iterable[str]) -> re.Pattern[str]:
    # \b cannot be used, because it asks for a letter after the full stop of "etc.".
    phrases = (r"\s+".join(map(re.escape, keyword.split())) for keyword in keywords)
    return re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE)


_EXPRESSIONS = {name: _expression(keywords) for name, keywords in PATTERNS.items()}


def patterns_of(text: str) -> frozenset[str]:
    """Return the patterns whose keywords occur in the text as whole words, in any case.

    A phrase may run across a line break.

    >>> sorted(patterns_of("Wait, either 4 or something\\nlike 5."))
    ['divergent', 'hypothesis', 'reflection']
    >>> patterns_of("The waiter concludes nothing.")
    frozenset()
    """
    return frozenset(name for name, expression in _EXPRESSIONS.items() if expression.search(text))


def pattern_shares(texts: Iterable[str], *, tasks: Iterable[str] | None = None) -> dict[str, Rate]:
    """Compute the share of texts that show each pattern.

    ``tasks`` names the task that each text answers, and the texts of one task do not count as independent
    (`clustered_interval`). Without it, each text counts as its own task.
    """
    shown = [patterns_of(text) for text in texts]
    if tasks is None:
        return {name: Rate(sum(name in patterns for patterns in shown), len(shown)) for name in PATTERNS}
    by_task: dict[str, list[frozenset[str]]] = {}
    for task, patterns in zip(tasks, shown, strict=True):
        by_task.setdefault(task, []).append(patterns)
    sizes = [len(group) for group in by_task.values()]
    rates = {}
    for name in PATTERNS:
        numbers = [sum(name in patterns for patterns in group) for group in by_task.values()]
        ends = clustered_interval(
            [number / size for number, size in zip(numbers, sizes, strict=True)], samples_each=sizes
        )
        rates[name] = Rate(sum(numbers), len(shown), ends=ends)
    return rates


def relative_change(before: Rate, after: Rate) -> float | None:
    """Compute the relative increase from the first share to the second.

    The paper's "+161.8 %" is 1.618. Returns None if the first share is 0 or one of the two is unmeasured.

    >>> relative_change(Rate(10, 100), Rate(26, 100))
    1.6
    """
    if not before.successes or not after.count:
        return None
    return (after.successes * before.count - before.successes * after.count) / (
        before.successes * after.count
    )
