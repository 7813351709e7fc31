"""Names for some columns of a matrix, such as ``lm_head.weight[:, 72:144]``, used to compare weights.

Embedding and head are a model's largest tensors. Anything that goes wrong with them on the way to an engine
shows in every column. Examples are a head that was left out of the update, an older one that stays packed,
and missing rows of one device.
"""

from __future__ import annotations

import re

from torch import Tensor

_PART = re.compile(r"(?P<name>.+)\[:, (?P<first>\d+):(?P<end>\d+)\]")


def part_name(name: str, columns: slice) -> str:
    """Return the name of some columns of a matrix.

    >>> part_name("lm_head.weight", slice(72, 144))
    'lm_head.weight[:, 72:144]'
    """
    return f"{name}[:, {columns.start}:{columns.stop}]"


def split_part(name: str) -> tuple[str, slice | None]:
    """Return the tensor's name and the selected columns, or None for the whole tensor.

    >>> split_part("lm_head.weight[:, 72:144]")
    ('lm_head.weight', slice(72, 144, None))
    >>> split_part("lm_head.weight")
    ('lm_head.weight', None)
    """
    part = _PART.fullmatch(name)
    return (name, None) if part is None else (part["name"], slice(int(part["first"]), int(part["end"])))


def take(tensor: Tensor, columns: slice | None) -> Tensor:
    """Return a view of the columns, or the whole tensor for None."""
    return tensor if columns is None else tensor[:, columns]
