"""A user-defined corpus source that yields a wrong value gives a single error.

It names the class, what came, and what is wanted.
"""

from __future__ import annotations

import pytest

from rpt_lightning.data.sources.checked_source import checked_documents
from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.types import Document

GOOD = Document(doc_id="a", text="text")


class Yields(CorpusSource):
    def __init__(self, documents):
        self._documents = documents

    def documents(self):
        return self._documents

    def describe(self):
        return {}


def test_documents_pass_in_their_order():
    other = Document(doc_id="b", text="")
    assert list(checked_documents(Yields(iter([GOOD, other])))) == [GOOD, other]


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([GOOD, "a text"], "yielded str 'a text' as document 2"),
        ([("a", "text")], r"yielded tuple \('a', 'text'\) as document 1"),
        ([b"bytes"], "yielded bytes b'bytes' as document 1"),
        ([None], "yielded NoneType None as document 1"),
        ([{"doc_id": "a", "text": "b"}], "yielded dict .* as document 1"),
        (None, "returned NoneType None as its documents"),
        ([Document(doc_id=7, text="a")], "yielded int 7 as doc_id of document 1"),
        ([GOOD, Document(doc_id="a", text=b"a")], "yielded bytes b'a' as text of document 2"),
    ],
)
def test_anything_else_is_one_error(documents, said):
    with pytest.raises(ValueError, match=rf"the source Yields {said}; wanted: documents\(\) that yields"):
        list(checked_documents(Yields(documents)))


def test_what_a_source_raises_goes_through():
    def fails():
        yield GOOD
        raise KeyError("mine")

    documents = checked_documents(Yields(fails()))
    assert next(documents) == GOOD
    with pytest.raises(KeyError, match="mine"):
        next(documents)
