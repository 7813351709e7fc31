"""The summary that `rpt prepare` prints at its end.

It gives the size of each split, what the splits share, what was left out, and which marks have no effect.
"""

from __future__ import annotations

from pathlib import Path

from rpt_lightning.data.store.manifest import Manifest


def closing_words(output: Path, manifest: Manifest) -> str:
    """Describe a newly published folder in one line."""
    train, heldout = manifest.splits["train"], manifest.splits["heldout"]
    words = [
        f"{split.positions:,} {name} positions in {split.documents:,} documents "
        f"({split.unanswerable:,} unanswerable)"
        for name, split in (("training", train), ("held-out", heldout))
    ]
    counts, settings = manifest.corpus, manifest.settings
    left_out = {
        f"documents of at most --min_context {settings['min_context']} tokens": counts.too_short,
        "documents with characters that the tokenizer has no tokens for": counts.inexpressible,
        f"positions for which {settings['objective']} has no material": (
            train.without_material + heldout.without_material
        ),
        "benchmark texts with such characters (no document can hold them)": (
            counts.inexpressible_benchmark_texts
        ),
    }
    words.append(shared_words(manifest.shared_spans_between_splits, settings["dedup_span"]))
    words += [f"left out {count:,} {what}" for what, count in left_out.items() if count]
    without_effect = {
        "no token begins in them, so no position has their fields": counts.marks_in_which_no_token_begins,
        f"they lie beyond --max_tokens_per_document {settings['max_tokens_per_document']}": (
            counts.marks_behind_the_cut
        ),
    }
    words += [
        f"{count:,} of {counts.marks:,} marks have no effect: {why}"
        for why, count in without_effect.items()
        if count
    ]
    if names := sorted(train.fields.keys() | heldout.fields.keys()):
        words.append(f"fields kept at positions: {', '.join(names)}")
    return f"{output}: {'; '.join(words)}"


def shared_words(number: int, span: int | None) -> str:
    """Describe what both splits hold.

    With a ``span``, documents that share ``span`` consecutive tokens were kept on one side. With None, only
    exact duplicates were left out.

    >>> shared_words(0, 13)
    '0 spans of 13 tokens (--dedup_span) in both splits'
    """
    if span is None:
        return (
            f"{number} documents in both splits (--dedup_span null: documents were compared as a whole only)"
        )
    return f"{number} spans of {span} tokens (--dedup_span) in both splits"
