"""Group near-duplicate documents into components, and split so that no component is on both sides.

Splitting by document is not enough. In a corpus of docstrings 19 of 40 validation documents shared 13
consecutive tokens with the training text, although no document was in both. Two documents that share any span
of ``span`` tokens are linked. Linked documents form components, and the components are split. Templated text
(logs, code, generated text) forms a single component that way, so a user may set another span, or None. With
None every document is a component of its own. Only exact duplicates, which are removed earlier, then count as
the same text.

The spans are compared by 64-bit hashes. A collision can only merge two components, never hide an overlap.
Memory: about 50 bytes per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

SPAN = 13
LEAST_SPAN = 2


def span_words(span: int | None) -> str:
    """Describe the components of documents in words.

    >>> span_words(13), span_words(None)
    ('components that share no 13 tokens in a row', 'components of one document each (--dedup_span null)')
    """
    return (
        "components of one document each (--dedup_span null)"
        if span is None
        else f"components that share no {span} tokens in a row"
    )


def check_span(span: int | None, *, longest: int) -> None:
    """Raise ValueError if no two documents can share the span.

    ``longest`` is the number of tokens of the longest document.
    """
    if span is not None and span > longest:
        raise ValueError(
            f"--dedup_span {span}: no document is that long (the longest has {longest} tokens), "
            "so nothing would be compared; give a smaller number, "
            "or null if only exact duplicates are to be left out"
        )


def span_hashes(token_ids: NDArray[np.int32], span: int = SPAN) -> NDArray[np.uint64]:
    """Hash every span of ``span`` consecutive tokens. [L] -> [max(0, L - span + 1)]."""
    count = len(token_ids) - span + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    mixed = _mix(token_ids.astype(np.uint64))
    total = np.zeros(count, np.uint64)
    factor = np.uint64(1)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        for offset in range(span):
            total += mixed[offset : offset + count] * factor
            factor *= np.uint64(0x9E3779B97F4A7C15)
    return _mix(total)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def components(documents: Sequence[NDArray[np.int32]], span: int | None = SPAN) -> NDArray[np.int32]:
    """Number the component of each document by first appearance. [D] documents -> [D].

    Documents shorter than ``span`` link only to documents with exactly the same tokens. If ``span`` is None,
    no documents link.
    """
    if span is None or not documents:
        return np.arange(len(documents), dtype=np.int32)
    # Adding the length keeps a short document's hash apart from the spans of longer documents.
    hashes = [
        span_hashes(ids, span)
        if len(ids) >= span
        else _mix(span_hashes(ids, max(1, len(ids))) + np.uint64(len(ids)))
        for ids in documents
    ]
    owner = np.repeat(np.arange(len(documents)), [len(part) for part in hashes])  # [S]
    flat = np.concatenate(hashes)  # [S]
    order = np.argsort(flat, kind="stable")
    flat, owner = flat[order], owner[order]
    same = flat[1:] == flat[:-1]
    left, right = owner[:-1][same], owner[1:][same]
    graph = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(len(documents), len(documents)))
    labels: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return labels


@dataclass(frozen=True, kw_only=True)
class Split:
    """Document indices of the two splits, ascending, and counts of the components and of what was left out.

    ``largest_component`` counts documents.
    """

    train: tuple[int, ...]
    heldout: tuple[int, ...]
    num_heldout_siblings: int
    num_components: int
    largest_component: int


def split_components(
    component: NDArray[np.int32], *, num_heldout: int, seed: int, span: int | None = SPAN
) -> Split:
    """Hold out ``num_heldout`` documents from as many components.

    The other documents of those components are left out of both splits. With one document per component the
    held-out documents are independent of each other. The largest component always trains, because boilerplate
    may link a good part of a corpus. Raises ValueError if there are too few components. The error names the
    ``span`` that they were made with.
    """
    sizes = np.bincount(component)
    order = np.random.default_rng(seed).permutation(len(sizes))
    if sizes.max() > 1:
        order = order[order != sizes.argmax()]
    if num_heldout >= len(sizes):
        way_out = "hold out fewer documents or give more text"
        if span is not None:
            way_out += (
                "; or, if the text is made from templates (logs, code, generated text), set --dedup_span, "
                f"which is {span}, to more tokens than its templates have in a row, or to null: "
                "then only exact duplicates count as the same text"
            )
        raise ValueError(
            f"--heldout_documents {num_heldout}: the corpus has only {len(sizes)} {span_words(span)}, "
            f"and at least one must train; {way_out}"
        )
    chosen = np.zeros(len(sizes), bool)
    chosen[order[:num_heldout]] = True
    train = np.flatnonzero(~chosen[component])
    first = {int(group): index for index, group in reversed(list(enumerate(component)))}
    heldout = sorted(first[int(group)] for group in order[:num_heldout])
    return Split(
        train=tuple(train.tolist()),
        heldout=tuple(heldout),
        num_heldout_siblings=len(component) - len(train) - len(heldout),
        num_components=len(sizes),
        largest_component=int(sizes.max()),
    )


def split_as_given(
    documents: Sequence[NDArray[np.int32]], is_heldout: Sequence[bool], span: int | None = SPAN
) -> Split:
    """Split as the source says. Training documents that share a span with a held-out one are left out.

    Components do not matter here: a source that knows the split keeps what belongs together on one side, so
    only the text itself has to be kept apart. Held-out documents may share spans with each other.
    """
    heldout = [index for index, held_out in enumerate(is_heldout) if held_out]
    train = [index for index, held_out in enumerate(is_heldout) if not held_out]
    kept = train
    if span is not None and heldout:
        wanted = np.unique(np.concatenate([span_hashes(documents[index], span) for index in heldout]))
        kept = [index for index in train if not np.isin(span_hashes(documents[index], span), wanted).any()]
    return Split(
        train=tuple(kept),
        heldout=tuple(heldout),
        num_heldout_siblings=len(train) - len(kept),
        num_components=len(documents),
        largest_component=1,
    )


def count_shared_spans(
    train: Sequence[NDArray[np.int32]], heldout: Sequence[NDArray[np.int32]], span: int | None = SPAN
) -> int:
    """Count the held-out spans of ``span`` tokens that are also in train, for the manifest.

    If ``span`` is None, count the held-out documents that are also in train. This function compares the
    tokens themselves and shares no code with the split, so that it can find a mistake there. It holds the
    held-out spans in memory.
    """
    if span is None:
        return len({ids.tobytes() for ids in heldout} & {ids.tobytes() for ids in train})
    width = 4 * span

    def spans(token_ids: NDArray[np.int32]) -> set[bytes]:
        raw = np.ascontiguousarray(token_ids, dtype=np.int32).tobytes()
        return {raw[start : start + width] for start in range(0, len(raw) - width + 1, 4)}

    wanted = set().union(*map(spans, heldout))
    return len(wanted & set().union(*(spans(token_ids) & wanted for token_ids in train)))
