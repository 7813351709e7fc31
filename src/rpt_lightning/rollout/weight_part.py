"""Some columns of a matrix under a name of their own, ``lm_head.weight[:, 72:144]``, where weights are compared.

Embedding and head are a model's largest tensors, and what goes wrong with them on the way to an engine (one is not delivered, an older one stays packed, a
device's rows are missing) shows in every column.
"""

from __future__ import annotations

import re

from torch import Tensor

_PART = re.compile(r"(?P<name>.+)\[:, (?P<first>\d+):(?P<end>\d+)\]")


def part_name(name: str, columns: slice) -> str:
    """
    >>> part_name("lm_head.weight", slice(72, 144))
    'lm_head.weight[:, 72:144]'
    """
    return f"{name}[:, {columns.start}:{columns.stop}]"


def split_part(name: str) -> tuple[str, slice | None]:
    """The tensor's name, and which columns are meant; None: the whole tensor.

    >>> split_part("lm_head.weight[:, 72:144]")
    ('lm_head.weight', slice(72, 144, None))
    >>> split_part("lm_head.weight")
    ('lm_head.weight', None)
    """
    part = _PART.fullmatch(name)
    return (name, None) if part is None else (part["name"], slice(int(part["first"]), int(part["end"])))


def take(tensor: Tensor, columns: slice | None) -> Tensor:
    """A view."""
    return tensor if columns is None else tensor[:, columns]
