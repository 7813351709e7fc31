"""Map what a source knows about a document from characters to tokens.

Fields of the whole document apply to every token. The fields of marks override them.

A mark's fields are those of the tokens that BEGIN inside it (docs/decisions.md, "Fields by token start").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.data.sources.row_text import look_up
from rpt_lightning.data.store.item_format import text_array
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Document, Fields, FieldValue


def value_problem(value: Any) -> str | None:
    """Describe what is wrong with the value of a field. Returns None for text and finite numbers.

    >>> [value_problem(value) for value in ("cups", 3, 0.5, True, float("nan"), [1])]
    [None, None, None, 'True is a bool', 'nan is not finite', '[1] is a list']
    """
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:60] + "..."
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return f"{shown} is a {type(value).__name__}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{shown} is not finite"
    if isinstance(value, str) and not _is_unicode(value):
        return f"{shown} is not Unicode"
    return None


def row_fields(names: Sequence[str], row: Mapping[str, Any], *, where: str) -> dict[str, FieldValue]:
    """Return the values of one record that are kept as fields of its document.

    A dot in a name leads into nested values (`look_up`). Raises ValueError that begins with ``where``.

    >>> row = {"text": "...", "depth": 3, "about": {"subject": "cups"}}
    >>> row_fields(["depth", "about.subject"], row, where="a.jsonl, line 1")
    {'depth': 3, 'about.subject': 'cups'}
    """
    kept = {name: look_up(row, name) for name in names}
    for name, value in kept.items():
        if value is None:
            raise ValueError(
                f"{where}: the field {name!r} is to be kept, but is missing or null there "
                f"(fields: {', '.join(map(str, row))}); correct --source.init_args.fields or the data"
            )
        if problem := value_problem(value):
            raise ValueError(
                f"{where}: the field {name!r} is to be kept, so it must be text or a finite number, "
                f"but {problem}; correct --source.init_args.fields or the data"
            )
    return kept


def check_document(document: Document, *, number: int) -> None:
    """Check that a document can be stored and that its marks lie inside its text.

    Raises ValueError that names the document by number (from 1) and id.
    """
    text_array(document.doc_id, what=f"--source: the id of document {number}, {document.doc_id!r},")
    where = f"--source: document {document.doc_id!r}"
    if not isinstance(document.text, str):
        raise ValueError(f"{where}: its text is a {type(document.text).__name__}")
    if document.split not in (None, "train", "heldout"):
        raise ValueError(f"{where}: its split is {document.split!r}, but must be train, heldout or None")
    _check_fields(document.fields, where)
    for index, mark in enumerate(document.marks):
        place = f"{where}, mark {index} (characters {mark.start!r} to {mark.end!r})"
        if not 0 <= mark.start < mark.end <= len(document.text):
            raise ValueError(
                f"{place}: is empty, or not inside the text, which has {len(document.text)} characters; "
                "correct the source"
            )
        _check_fields(mark.fields, place)


def knowledge_bytes(document: Document) -> bytes:
    """Return fields, marks and split for the fingerprint of a corpus. Without them it is empty."""
    split = b"" if document.split is None else b"split\0" + document.split.encode() + b"\0"
    if not document.fields and not document.marks:
        return split
    marks = [[mark.start, mark.end, dict(mark.fields), mark.thought] for mark in document.marks]
    fields = json.dumps([dict(document.fields), marks], sort_keys=True).encode()
    return b"fields\0" + fields + b"\0" + split


@dataclass(frozen=True, kw_only=True)
class TokenFields:
    """Fields of a document by token.

    ``spans`` are marks: tokens ``first`` to ``stop`` (exclusive). If two overlap, the later mark takes
    precedence. ``num_marks`` counts all marks. It includes those in which no token begins
    (``num_without_token``) and those wholly after the point where the document was truncated
    (``num_behind_cut``).
    """

    fields: Fields
    spans: tuple[tuple[int, int, Fields], ...]
    num_marks: int
    num_without_token: int
    num_behind_cut: int

    @property
    def is_empty(self) -> bool:
        """Whether no token has any field."""
        return not self.fields and not any(fields for _, _, fields in self.spans)

    def at(self, positions: NDArray[np.int32]) -> list[dict[str, FieldValue]] | None:
        """Return the fields of the tokens at ascending ``positions`` [P].

        Returns None if no token of the document has any field.
        """
        if self.is_empty:
            return None
        rows = [dict(self.fields) for _ in positions]
        for first, stop, fields in self.spans:
            for k in range(*np.searchsorted(positions, [first, stop]).tolist()):
                rows[k].update(fields)
        return rows


def token_fields(
    document: Document, token_ids: Sequence[int], token_bytes: TokenBytes, *, num_kept: int
) -> TokenFields | None:
    """Find the fields of each token of a document.

    Only the first ``num_kept`` of its ``token_ids`` are used. Returns None if the source knows nothing about
    the document.
    """
    if not document.marks:
        return (
            TokenFields(fields=document.fields, spans=(), num_marks=0, num_without_token=0, num_behind_cut=0)
            if document.fields
            else None
        )
    ends = np.cumsum([len(token_bytes[token]) for token in token_ids])  # [L] bytes
    starts = np.concatenate([[0], ends])[:-1]  # [L]
    offsets = _byte_offsets(token_bytes.plain_text(document.text))  # [characters + 1]
    assert offsets[-1] == (ends[-1] if len(ends) else 0)
    spans, num_without_token, num_behind_cut = [], 0, 0
    for mark in document.marks:
        first, stop = np.searchsorted(starts, [offsets[mark.start], offsets[mark.end]]).tolist()
        if first == stop:
            num_without_token += 1
        elif first >= num_kept:
            num_behind_cut += 1
        else:
            spans.append((first, stop, mark.fields))
    return TokenFields(
        fields=document.fields,
        spans=tuple(spans),
        num_marks=len(document.marks),
        num_without_token=num_without_token,
        num_behind_cut=num_behind_cut,
    )


def _byte_offsets(text: str) -> NDArray[np.int64]:
    """Return the byte offset of each character in UTF-8, and the end of the last one. -> [characters + 1].

    >>> _byte_offsets("aé€\U0001f600").tolist()
    [0, 1, 3, 6, 10]
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)


def _check_fields(fields: Any, where: str) -> None:
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"{where}: its fields are a {type(fields).__name__}, but must be a mapping of names to values"
        )
    for name, value in fields.items():
        if not isinstance(name, str) or not name or not _is_unicode(name):
            raise ValueError(f"{where}: the name of a field is {name!r}, but must be text")
        problem = value_problem(value)
        if problem:
            raise ValueError(f"{where}: the field {name!r} must be text or a finite number, but {problem}")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
