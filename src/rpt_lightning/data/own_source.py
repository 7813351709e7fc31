"""What a corpus source of the user's own must yield: one error that names the class, what came, and what is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rpt_lightning.data.corpus import CorpusSource
from rpt_lightning.types import Document

WANTED = (
    "wanted: documents() that yields rpt_lightning.types.Document(doc_id=..., text=...), both of them text"
)


def checked_documents(source: CorpusSource) -> Iterator[Document]:
    """The documents of a source. Raises ValueError at what is none; what the source itself raises goes through as it is."""
    name = type(source).__name__
    documents: Any = source.documents()
    if not isinstance(documents, Iterable):
        raise ValueError(f"the source {name} returned {_said(documents)} as its documents; {WANTED}")
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, Document):
            raise ValueError(f"the source {name} yielded {_said(document)} as document {number}; {WANTED}")
        for field in ("doc_id", "text"):
            if not isinstance(getattr(document, field), str):
                raise ValueError(
                    f"the source {name} yielded {_said(getattr(document, field))} as {field} of document {number}; {WANTED}"
                )
        yield document


def _said(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
