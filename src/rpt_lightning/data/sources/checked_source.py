"""Check the documents of a user-defined corpus source.

A single error names the class, what it yielded, and what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.types import Document

WANTED = (
    "wanted: documents() that yields rpt_lightning.types.Document(doc_id=..., text=...), both of them text"
)


def checked_documents(source: CorpusSource) -> Iterator[Document]:
    """Yield the documents of a source.

    Raises ValueError if it yields anything else. Errors that the source itself raises pass through unchanged.
    """
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
                    f"the source {name} yielded {_said(getattr(document, field))} as {field} "
                    f"of document {number}; {WANTED}"
                )
        yield document


def _said(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
