"""Group held-out positions by what the corpus knows about them (`PositionResult.fields`)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

from rpt_lightning.records.results import PositionResult
from rpt_lightning.types import FieldValue

MAX_VALUES = 12
NUM_BINS = 6
OTHER = "other"


def field_names(positions: Iterable[PositionResult]) -> list[str]:
    """Return the fields that any of the positions has, in alphabetical order."""
    return sorted({name for position in positions for name in position.fields or ()})


def field_value(position: PositionResult, name: str) -> FieldValue | None:
    """Return the value of a field, or None if the position does not have it."""
    return (position.fields or {}).get(name)


def is_numeric(positions: Iterable[PositionResult], name: str) -> bool:
    """Whether every value of the field is a number."""
    return not any(isinstance(field_value(position, name), str) for position in positions)


def field_groups(positions: Sequence[PositionResult], name: str) -> list[tuple[str, list[PositionResult]]]:
    """Group the positions that have the field ``name``, with a label for each group (`value_labels`).

    No group is empty.

    >>> def position(k, **fields):
    ...     return PositionResult(
    ...         task_id=f"d:{k}", doc_id="d", position=k, entropy=1.0, answerable=True, truth="",
    ...         ntp_correct=False, ntp_logprob=-1.0, fields=fields
    ...     )
    >>> groups = field_groups(
    ...     [position(1, depth=10), position(2, depth=2), position(3), position(4, depth=10)], "depth"
    ... )
    >>> [(label, [one.position for one in members]) for label, members in groups]
    [('2', [2]), ('10', [1, 4])]
    """
    values = [value for position in positions if (value := field_value(position, name)) is not None]
    labels = value_labels(values)
    groups: dict[str, list[PositionResult]] = {label: [] for label in labels.values()}
    for position in positions:
        if (value := field_value(position, name)) is not None:
            groups[labels[value]].append(position)
    return list(groups.items())


def value_labels(values: Iterable[FieldValue]) -> dict[FieldValue, str]:
    """Return the label of each value's group, in the order in which groups are shown.

    - At most 12 distinct values have a group each. Numbers are in numeric order and texts in alphabetical
      order.
    - More numbers share about 6 ranges that each hold about equally many of the ``values``.
    - Of more texts (or texts and numbers), the 11 most frequent have a group each, and the rest is "other".

    >>> value_labels([3, 1, 2.5, 1])
    {1: '1', 2.5: '2.5', 3: '3'}
    >>> list(dict.fromkeys(value_labels(range(18)).values()))
    ['0 to 2', '3 to 5', '6 to 8', '9 to 11', '12 to 14', '15 to 17']
    """
    counts = Counter(values)
    numbers = [value for value in counts if not isinstance(value, str)]
    if len(numbers) < len(counts):
        return _text_labels(counts)
    if len(numbers) <= MAX_VALUES:
        return {value: number_text(value) for value in sorted(numbers)}
    return _range_labels(sorted(number for number in counts.elements() if not isinstance(number, str)))


def _text_labels(counts: Counter[FieldValue]) -> dict[FieldValue, str]:
    texts = Counter[str]()  # in a mix of texts and numbers, 1 and "1" look the same
    for value, count in counts.items():
        texts[_text(value)] += count
    shown = sorted(texts)
    if len(texts) > MAX_VALUES:
        shown = [
            text for text, _ in sorted(texts.items(), key=lambda item: (-item[1], item[0]))[: MAX_VALUES - 1]
        ]
    rest = OTHER if OTHER not in shown else f"all {OTHER}"
    label = {text: text if text in shown else rest for text in texts}
    order = {text: place for place, text in enumerate(shown)}
    return {
        value: label[_text(value)]
        for value in sorted(counts, key=lambda value: (order.get(_text(value), len(order)), _text(value)))
    }


def _range_labels(values: Sequence[int | float]) -> dict[FieldValue, str]:
    """Label ascending ``values``, each as often as it occurs.

    Equal values share a range, so there may be fewer ranges.
    """
    edges = sorted(
        {values[(len(values) * part - 1) // NUM_BINS] for part in range(1, NUM_BINS)}
    )  # a range includes its upper edge
    ranges: dict[int, list[int | float]] = {}
    for value in dict.fromkeys(values):
        ranges.setdefault(bisect_left(edges, value), []).append(value)
    labels: dict[FieldValue, str] = {}
    for members in ranges.values():
        ends = [number_text(end) for end in (members[0], members[-1])]
        labels |= dict.fromkeys(members, ends[0] if len(members) == 1 else " to ".join(ends))
    return labels


def number_text(value: FieldValue) -> str:
    """Format a number as briefly as possible while it can still be told apart from others.

    >>> [number_text(value) for value in (3, 3.0, 0.5, 0.1 + 0.2, 10**15)]
    ['3', '3', '0.5', '0.30000000000000004', '1000000000000000']
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    short = f"{value:.6g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(float(value))


def _text(value: FieldValue) -> str:
    return value if isinstance(value, str) else number_text(value)
