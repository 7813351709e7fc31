"""The global order of training items, a function of (seed, epoch, index) and of nothing else.

It does not depend on ranks, workers or resumption. Every rank computes the same order, takes the same steps
from it and keeps its own share of each step (``rank_share``). litdata's shuffled order depends on the number
of ranks, so with it a run could not move to another machine.

The shuffle is aware of chunks, so that shards can stream. Chunks are permuted, and documents are mixed only
within a window of ``WINDOW_CHUNKS`` chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

WINDOW_CHUNKS = 8
TIERS = "tiers"  # what a stored place calls an order by tiers
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """A place in an endless order: the epoch, and the index of the next item in it. Both count from 0."""

    epoch: int
    index: int


class Order(ABC):
    """An endless order of ``(document, k)`` pairs, in which a place leads to the next one.

    Args:
        num_documents: Number of documents that are ordered.
        items_per_epoch: Number of pairs.
        bundle_size: Number of items of a document that follow each other.
        seed: Seed of the order.
    """

    def __init__(self, *, num_documents: int, items_per_epoch: int, bundle_size: int, seed: int) -> None:
        self.num_documents = num_documents
        self.items_per_epoch = items_per_epoch
        self.bundle_size = bundle_size
        self.seed = seed

    @property
    def first(self) -> Place:
        """The place at which a run begins."""
        return Place(epoch=0, index=0)

    @abstractmethod
    def __getitem__(self, place: Place) -> tuple[int, int]:
        """Return the pair at a place."""

    @abstractmethod
    def after(self, place: Place) -> Place:
        """Return the place after the pair at a place."""

    def at_next_step(self, place: Place) -> Place:
        """Return the place at which the next step begins. An order may depend on the step."""
        return place

    @property
    def settings(self) -> dict[str, int | str]:
        """What the order was made with, by its name in messages."""
        return {
            "seed": self.seed,
            "positions_per_document": self.bundle_size,
            "number of documents": self.num_documents,
            "number of positions": self.items_per_epoch,
        }

    def stored(self, place: Place) -> dict[str, Any]:
        """Return a place in JSON types."""
        return {"epoch": place.epoch, "index": place.index}

    def restored(self, state: dict[str, Any]) -> Place:
        """Return a stored place."""
        return Place(epoch=int(state["epoch"]), index=int(state["index"]))


class ShuffledOrder(Order):
    """An order of ``(document, k)`` pairs with k < num_items[document].

    Up to ``bundle_size`` items of a document follow each other.

    Args:
        num_items: Number of items of each document. [D]
        chunk_sizes: Number of documents in each chunk, in order. [C]
        bundle_size: Number of items of a document that are next to each other. They share their prefix.
        seed: Seed of the order.
    """

    def __init__(
        self, num_items: NDArray[np.int32], chunk_sizes: Sequence[int], *, bundle_size: int, seed: int
    ) -> None:
        super().__init__(
            num_documents=len(num_items),
            items_per_epoch=int(num_items.sum()),
            bundle_size=bundle_size,
            seed=seed,
        )
        self.num_items = num_items
        self._bounds = np.concatenate([[0], np.cumsum(chunk_sizes)])  # [C + 1] documents
        cumulative = np.concatenate([[0], np.cumsum(num_items)])
        self._chunk_items = np.diff(cumulative[self._bounds])  # [C] items of each chunk
        self._epoch: int | None = None
        self._window: tuple[int, int] | None = None

    def __getitem__(self, place: Place) -> tuple[int, int]:
        """Return the pair at a place."""
        epoch, index = place.epoch, place.index
        assert 0 <= index < self.items_per_epoch
        self._enter_epoch(epoch)
        window = int(np.searchsorted(self._window_ends, index, side="right"))
        self._enter_window(epoch, window)
        start = self._window_ends[window - 1] if window else 0
        document, item = self._pairs[index - start]
        return int(document), int(item)

    def after(self, place: Place) -> Place:
        """Return the place after it. After the last pair of an epoch comes the first of the next epoch."""
        index = place.index + 1
        return Place(place.epoch + 1, 0) if index == self.items_per_epoch else Place(place.epoch, index)

    def _enter_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch, self._window = epoch, None
        self._chunks = np.random.default_rng([self.seed, epoch]).permutation(len(self._chunk_items))
        items = self._chunk_items[self._chunks]
        self._window_ends = np.cumsum(
            [items[start : start + WINDOW_CHUNKS].sum() for start in range(0, len(items), WINDOW_CHUNKS)]
        )  # [W]

    def _enter_window(self, epoch: int, window: int) -> None:
        if self._window == (epoch, window):
            return
        self._window = (epoch, window)
        rng = np.random.default_rng([self.seed, epoch, window + 1])
        chunks = self._chunks[window * WINDOW_CHUNKS : (window + 1) * WINDOW_CHUNKS]
        # [D of the window]
        documents = _ranges(self._bounds[chunks], self._bounds[chunks + 1] - self._bounds[chunks])
        counts = self.num_items[documents].astype(np.int64)  # [D]
        items = np.concatenate([rng.permutation(count) for count in counts.tolist()])  # [P]
        pairs = np.stack([np.repeat(documents, counts), items], axis=1)  # [P, 2]
        # There may be millions of bundles, so only their starts and ends are kept.
        num_bundles = -(-counts // self.bundle_size)  # [D]
        ends = np.repeat(np.cumsum(counts), num_bundles)  # [B] end of each bundle's document
        starts = _ranges(np.cumsum(counts) - counts, num_bundles, step=self.bundle_size)  # [B]
        lengths = np.minimum(ends - starts, self.bundle_size)  # [B]
        order = rng.permutation(len(starts))  # [B]
        self._pairs = pairs[_ranges(starts[order], lengths[order])]  # [P, 2]


def _ranges(starts: NDArray[Any], lengths: NDArray[Any], *, step: int = 1) -> NDArray[Any]:
    """Concatenate ranges: for each ``i``, ``lengths[i]`` numbers from ``starts[i]`` on, ``step`` apart.

    [N], [N] -> [sum of lengths].

    >>> _ranges(np.array([5, 0, 8]), np.array([2, 0, 3])).tolist()
    [5, 6, 8, 9, 10]
    >>> _ranges(np.array([0, 7]), np.array([3, 1]), step=2).tolist()
    [0, 2, 4, 7]
    """
    places = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # in each range
    return np.repeat(starts, lengths) + step * places


class TaskStream:
    """The items of an order, one after the other, and the ``place`` in it.

    A checkpoint stores the place. ``corpus`` is the fingerprint of the text that is ordered. ``layout`` is
    the fingerprint of its division into documents and shards. It is empty if the text alone determines that.
    """

    def __init__(self, order: Order, *, corpus: str, layout: str = "") -> None:
        self.order = order
        self.corpus = corpus
        self.layout = layout
        self.place = order.first

    def begin_step(self) -> None:
        """Go to where the next step begins. What is taken until the next call belongs to that step."""
        self.place = self.order.at_next_step(self.place)

    def next(self, num: int) -> list[tuple[int, int]]:
        """Take the next ``num`` pairs."""
        pairs = []
        for _ in range(num):
            pairs.append(self.order[self.place])
            self.place = self.order.after(self.place)
        return pairs

    def state_dict(self, place: Place | None = None) -> dict[str, Any]:
        """Return the state at the present place, or at an earlier ``place``."""
        stored = self.place if place is None else place
        return self.order.stored(stored) | {"made_with": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a stored place. Raises ValueError if it belongs to a different order."""
        settings = self._settings()
        # Without tiers, nothing is stored of them.
        made_with, settings = ({TIERS: "none"} | found for found in (state["made_with"], settings))
        # A checkpoint from before corpus or layout were stored does not name them.
        different = [name for name in settings if made_with.get(name, settings[name]) != settings[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"--ckpt_path: the checkpoint's place in the data belongs to {name} "
                f"{made_with.get(name)}, and this run has {settings[name]}; "
                "continue with the same --data settings and task folder (or one that was made again with the "
                "same settings of `rpt prepare`), or start a new run from exported weights"
            )
        self.place = self.order.restored(state)

    def _settings(self) -> dict[str, int | str]:
        return self.order.settings | {
            "text with the fingerprint": self.corpus,
            "documents in the order with the fingerprint": self.layout,
        }


def rank_share(items: Sequence[T], *, rank: int, num_ranks: int) -> Sequence[T]:
    """Return the part of a step that one data-parallel rank takes.

    The part is contiguous, so that positions of a document stay together. Sizes differ by at most one.

    >>> rank_share("abcde", rank=0, num_ranks=2), rank_share("abcde", rank=1, num_ranks=2)
    ('ab', 'cde')
    """
    return items[len(items) * rank // num_ranks : len(items) * (rank + 1) // num_ranks]
