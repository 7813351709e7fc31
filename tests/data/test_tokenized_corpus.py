from __future__ import annotations

from pathlib import Path
from typing import Any

from rpt_lightning.data.prepare.tokenized_corpus import TokenizedCorpus
from rpt_lightning.data.sources.corpus import JsonlSource
from rpt_lightning.pretrained.token_bytes import TokenBytes


def test_a_document_that_is_cut_does_not_keep_the_whole_one_in_memory(
    corpus_path: Path, tiny_tokenizer: Any
) -> None:
    source = JsonlSource(str(corpus_path), template="{problem}")
    corpus = TokenizedCorpus(source, TokenBytes(tiny_tokenizer), min_context=2, max_tokens=5)
    assert any(corpus.is_cut)
    assert all(len(ids) <= 5 for ids in corpus.token_ids)
    assert all(ids.base is None for ids in corpus.token_ids)  # not a view of a longer array
