"""What changed in a tensor between two versions: which of its entries or rows, and their new values.

A patch is lossless. Tensors are compared and overwritten as bits, never by arithmetic, so NaN payloads and
the sign of zeros survive. docs/weight-sync.md describes the format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MORE = 255  # a gap byte that is not the last one of its gap


@dataclass(frozen=True)
class Changes:
    """Which entries of a tensor changed, and the smallest way to send them.

    Attributes:
        differs: Mask of the entries whose bits differ, bool [numel].
        num_changed: Their number.
        block: Entries that are sent together: 1 (single entries), the length of a row, or all entries.
        num_bytes: Size of the patch in bytes, without the bytes by which long gaps exceed one byte.
    """

    differs: Tensor
    num_changed: int
    block: int
    num_bytes: int


@dataclass(frozen=True)
class Patch:
    """New values for some blocks of a tensor, which counts as a matrix [numel / block, block].

    Attributes:
        block: Entries of a block.
        gaps: Number of unchanged blocks before each changed one, uint8 (see ``encode_gaps``).
        values: The changed blocks, in the tensor's dtype, [blocks, block].
    """

    block: int
    gaps: Tensor
    values: Tensor

    @property
    def num_bytes(self) -> int:
        return self.gaps.nbytes + self.values.nbytes


def find_changes(old: Tensor, new: Tensor) -> Changes:
    """Compare two tensors of the same shape and dtype bit by bit.

    >>> old = torch.zeros(2, 3)
    >>> find_changes(old, torch.tensor([[0.0, 0.0, 7.0], [0.0, 0.0, 0.0]])).block  # one entry: 5 bytes
    1
    >>> find_changes(old, torch.tensor([[1.0, 2.0, 7.0], [0.0, 0.0, 0.0]])).block  # a row: 13 bytes, not 15
    3
    """
    assert (old.shape, old.dtype) == (new.shape, new.dtype)
    differs = _bits(new) != _bits(old)
    num_changed, size = int(differs.count_nonzero()), new.element_size()
    if num_changed == 0:
        return Changes(differs, 0, 1, 0)
    sizes = {1: num_changed * (1 + size), new.numel(): 1 + new.numel() * size}
    if new.ndim > 1:
        row = new.shape[-1]
        sizes[row] = int(_any(differs, row).count_nonzero()) * (1 + row * size)
    block = min(sizes, key=lambda length: sizes[length])
    return Changes(differs, num_changed, block, sizes[block])


def make_patch(new: Tensor, changes: Changes) -> Patch:
    """Return the patch that turns the old tensor of ``find_changes`` into the new one."""
    blocks = changes.differs if changes.block == 1 else _any(changes.differs, changes.block)
    places = blocks.nonzero().view(-1)
    return Patch(changes.block, encode_gaps(places), new.reshape(-1, changes.block)[places])


def apply_patch(tensor: Tensor, patch: Patch) -> None:
    """Overwrite the changed blocks of a contiguous tensor in place.

    Raises:
        ValueError: The patch does not fit the tensor. The tensor is then unchanged.
    """
    places = decode_gaps(patch.gaps)
    if patch.block < 1 or tensor.numel() % patch.block or patch.values.dtype != tensor.dtype:
        raise ValueError(
            f"blocks of {patch.block} entries in {patch.values.dtype} do not fit a tensor of "
            f"{tensor.numel()} entries in {tensor.dtype}"
        )
    if patch.values.shape != (len(places), patch.block):
        raise ValueError(f"{tuple(patch.values.shape)} values for {len(places)} blocks of {patch.block}")
    if len(places) and int(places[-1]) >= tensor.numel() // patch.block:
        raise ValueError(f"block {int(places[-1])} lies behind the end of the tensor")
    _bits(tensor).view(-1, patch.block)[places] = _bits(patch.values).view(-1, patch.block)


def encode_gaps(places: Tensor) -> Tensor:
    """Encode increasing numbers, int64 [n], as the gaps between them, uint8.

    A gap is the sum of its bytes. Every byte but its last one is 255, and the last one is smaller. So a gap
    below 255 takes one byte, and a tensor's gaps take at most one byte more for every 255 of its entries.

    >>> encode_gaps(torch.tensor([2, 3, 259])).tolist()
    [2, 0, 255, 0]
    """
    before = torch.cat([places.new_tensor([-1]), places[:-1]])
    gaps = places - before - 1
    ends = (gaps // _MORE + 1).cumsum(0) - 1
    encoded = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), _MORE, dtype=torch.uint8)
    encoded[ends] = (gaps % _MORE).to(torch.uint8)
    return encoded


def decode_gaps(encoded: Tensor) -> Tensor:
    """Return the numbers, int64 [n], that ``encode_gaps`` encoded.

    >>> decode_gaps(torch.tensor([2, 0, 255, 0], dtype=torch.uint8)).tolist()
    [2, 3, 259]
    """
    if encoded.dtype != torch.uint8 or encoded.ndim != 1 or (len(encoded) and encoded[-1] == _MORE):
        raise ValueError("the gaps of a patch are cut off or have another type")
    ends = encoded != _MORE
    places = encoded.cumsum(0, dtype=torch.int64)[ends]
    return places + torch.arange(len(places))


def _any(differs: Tensor, block: int) -> Tensor:
    """Return which blocks have an entry that differs. Much faster than ``any`` on a CPU (torch 2.13)."""
    return differs.view(torch.uint8).view(-1, block).amax(dim=1)


def _bits(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's entries as integers of the same size, [numel]."""
    return tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
