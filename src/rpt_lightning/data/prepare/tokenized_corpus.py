"""The documents of a corpus that may become tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.data.prepare.benchmark_overlap import benchmark_spans, overlaps
from rpt_lightning.data.prepare.dedup import (
    check_span,
    components,
    span_words,
    split_as_given,
    split_components,
)
from rpt_lightning.data.sources.checked_source import checked_documents
from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.data.sources.fields import TokenFields, check_document, knowledge_bytes, token_fields
from rpt_lightning.data.store.manifest import CorpusCounts
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Document


def source_sha256(source: CorpusSource) -> str:
    """Fingerprint all documents of a source in order: ``counts.sha256`` of the corpus made from it."""
    digest = hashlib.sha256()
    for document in read_documents(source):
        digest.update(document_bytes(document))
    return digest.hexdigest()


def read_documents(source: CorpusSource) -> Iterator[Document]:
    """Yield the documents of a source. Raises ValueError if one is not a document or cannot be stored."""
    for number, document in enumerate(checked_documents(source), start=1):
        check_document(document, number=number)
        yield document


def document_bytes(document: Document) -> bytes:
    """Return the bytes of a document that enter a corpus's fingerprint: id, text, fields and marks."""
    return f"{document.doc_id}\0{document.text}\0".encode(errors="surrogatepass") + knowledge_bytes(document)


class TokenizedCorpus:
    """Documents as token ids.

    Documents are left out if they are too short, are exact duplicates, or contain characters that the
    tokenizer has no tokens for. ``counts`` gives the number left out for each reason. Special tokens in a
    text are plain text. ``max_tokens`` truncates documents (``is_cut``). Raises ValueError if nothing is
    left.
    """

    def __init__(
        self, source: CorpusSource, token_bytes: TokenBytes, *, min_context: int, max_tokens: int | None
    ) -> None:
        self.doc_ids: list[str] = []
        self.token_ids: list[NDArray[np.int32]] = []
        self.is_cut: list[bool] = []
        self.fields: list[TokenFields | None] = []
        self.splits: list[str | None] = []
        digest = hashlib.sha256()
        seen: set[bytes] = set()
        num_read = num_short = num_duplicates = num_inexpressible = 0
        for document in read_documents(source):
            num_read += 1
            digest.update(document_bytes(document))
            try:
                full = token_bytes.encode_plain(document.text)
            except ValueError:
                num_inexpressible += 1
                continue
            token_ids = np.array(full[:max_tokens], dtype=np.int32)
            fingerprint = hashlib.sha256(token_ids.tobytes()).digest()
            if len(token_ids) <= min_context:
                num_short += 1
            elif fingerprint in seen:
                num_duplicates += 1
            else:
                seen.add(fingerprint)
                self.doc_ids.append(document.doc_id)
                self.token_ids.append(token_ids)
                self.is_cut.append(len(full) > len(token_ids))
                self.splits.append(document.split)
                self.fields.append(token_fields(document, full, token_bytes, num_kept=len(token_ids)))
        if num_read == 0:
            raise ValueError(
                f"--source: the corpus is empty ({json.dumps(source.describe())}); "
                "check its path, pattern or split"
            )
        if not self.token_ids:
            if num_inexpressible == num_read:
                raise ValueError(
                    f"--tokenizer: it has no tokens for some character of each of the {num_read} documents; "
                    "name another tokenizer"
                )
            raise ValueError(
                f"--min_context {min_context}: none of the {num_read} documents is longer than "
                "that many tokens; lower it"
            )
        self.counts = CorpusCounts(
            sha256=digest.hexdigest(),
            documents_read=num_read,
            too_short=num_short,
            inexpressible=num_inexpressible,
            exact_duplicates=num_duplicates,
        )

    def drop_benchmark_overlap(self, paths: list[str], token_bytes: TokenBytes) -> None:
        """Leave out documents that share a span of 13 tokens with a benchmark file."""
        if not paths:
            return
        spans, num_inexpressible = benchmark_spans(paths, token_bytes)
        kept = [index for index, ids in enumerate(self.token_ids) if not overlaps(ids, spans)]
        self.counts = replace(
            self.counts,
            inexpressible_benchmark_texts=num_inexpressible,
            overlap_with_benchmark_files=len(self.token_ids) - len(kept),
        )
        if not kept:
            raise ValueError(
                f"--benchmark_files [{','.join(paths)}]: every document overlaps with them, "
                "so nothing is left; check the files"
            )
        self.doc_ids = [self.doc_ids[index] for index in kept]
        self.token_ids = [self.token_ids[index] for index in kept]
        self.is_cut = [self.is_cut[index] for index in kept]
        self.fields = [self.fields[index] for index in kept]
        self.splits = [self.splits[index] for index in kept]

    @property
    def has_fields(self) -> bool:
        """Whether the source knows a field of any token."""
        return any(fields is not None and not fields.is_empty for fields in self.fields)

    def split(
        self, *, num_heldout: int, max_documents: int | None, span: int | None, seed: int
    ) -> tuple[list[int], list[int]]:
        """Return the indices of the held-out and of the training documents.

        Both are shuffled, because shards in corpus order would make batches of a single topic. Documents that
        share ``span`` consecutive tokens are on the same side (dedup.py). If the source says on which side
        its documents are, they are there, and ``num_heldout`` does not matter.
        """
        check_span(span, longest=max(map(len, self.token_ids)))
        is_given = any(split is not None for split in self.splits)
        if is_given:
            self._check_given(max_documents)
            split = split_as_given(self.token_ids, [split == "heldout" for split in self.splits], span)
            num_heldout = len(split.heldout)
        else:
            split = split_components(
                components(self.token_ids, span), num_heldout=num_heldout, seed=seed, span=span
            )
        rng = np.random.default_rng([seed, 1])
        heldout, train = rng.permutation(split.heldout).tolist(), rng.permutation(split.train).tolist()
        if max_documents is not None:
            train = train[: max_documents - num_heldout]
        self.counts = replace(
            self.counts,
            components=split.num_components,
            largest_component=split.largest_component,
            siblings_of_heldout_documents=split.num_heldout_siblings,
            not_sampled=len(split.train) - len(train),
        )
        self._count_marks([*heldout, *train])
        if is_given:
            print(
                f"{len(self.token_ids):,} documents, split by their source; using {len(train):,} for "
                f"training and {len(heldout):,} held out; {split.num_heldout_siblings:,} training documents "
                f"share {'a whole text' if span is None else f'{span} tokens in a row'} with held-out ones "
                "and are left out",
                flush=True,
            )
            if not train:
                raise ValueError(
                    "--source: no training document is left, because each shares text with a held-out one; "
                    f"give --dedup_span, which is {span}, a larger number, or null if only equal texts count"
                )
            return heldout, train
        largest = (
            ""
            if span is None
            else f" (the largest, of {split.largest_component:,} documents, is kept for training)"
        )
        print(
            f"{len(self.token_ids):,} documents in {split.num_components:,} {span_words(span)}{largest}; "
            f"using {len(train):,} for training and {len(heldout):,} held out",
            flush=True,
        )
        return heldout, train

    def _check_given(self, max_documents: int | None) -> None:
        """Raise ValueError if the split that the source gives cannot be made."""
        counts = {split: self.splits.count(split) for split in ("train", "heldout", None)}
        if counts[None]:
            raise ValueError(
                f"--source: it says of {counts['train'] + counts['heldout']} documents on which side of the "
                f"split they are, and not of {counts[None]}; give Document.split for all of them or for none"
            )
        for side in ("train", "heldout"):
            if not counts[side]:
                raise ValueError(
                    f"--source: it says which documents are held out, but no {side} document is left of "
                    "those that are long enough, different from the others and expressible"
                )
        if max_documents is not None and max_documents <= counts["heldout"]:
            raise ValueError(
                f"--max_documents {max_documents}: must exceed the {counts['heldout']} documents that the "
                "source holds out"
            )

    def _count_marks(self, indices: list[int]) -> None:
        """Count the marks of the documents that are used. Counts nothing if the source has no marks."""
        marked = [
            fields for index in indices if (fields := self.fields[index]) is not None and fields.num_marks
        ]
        if marked:
            self.counts = replace(
                self.counts,
                marks=sum(fields.num_marks for fields in marked),
                marks_in_which_no_token_begins=sum(fields.num_without_token for fields in marked),
                marks_behind_the_cut=sum(fields.num_behind_cut for fields in marked),
            )
