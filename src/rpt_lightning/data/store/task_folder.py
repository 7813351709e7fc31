"""Read a task folder."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rpt_lightning.compat.litdata import INDEX_FILE, open_items, read_index
from rpt_lightning.data.prepare.proxy_model import load_tokenizer
from rpt_lightning.data.sources.data_files import expand_home
from rpt_lightning.data.store.item_format import FIELDS, MATERIAL, Item, decode_item
from rpt_lightning.data.store.manifest import LATER_SETTINGS, MANIFEST_FILE, read_manifest
from rpt_lightning.data.store.remote_folder import RemoteFolder, is_remote
from rpt_lightning.data.store.shards import NUM_POSITIONS_FILE, check_file, check_split
from rpt_lightning.pretrained.specification import has_hash, tokenizer_hash
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import TokenIds, TokenTask

# Number of documents kept in memory: the positions of a document are read one after the other.
CACHED_DOCUMENTS = 64
# Settings of `rpt prepare` that do not affect the index and positions of a training document. They are names,
# which may differ on another machine, the size of a shard, which the shards themselves tell, and settings for
# held-out positions only.
NOT_OF_THE_LAYOUT = frozenset(
    {"source", "tokenizer", "proxy", "benchmark_files", "chunk_bytes", "heldout_entropy_threshold"}
)


class TaskFolder:
    """One split of a folder made by ``rpt prepare``.

    The folder is checked when it is opened. Documents are read when they are needed.

    Args:
        path: The task folder, on this machine or in storage (``s3://bucket/folder``, remote_folder.py).
        split: "train" or "heldout".
        max_context_tokens: Truncate longer contexts on the left.

    ``num_following_tokens`` is how many tokens from the position on a task carries (0 at first). With
    ``carries_rest`` (False at first) a task also carries the whole rest of its document.
    """

    def __init__(
        self, path: str | Path, split: Literal["train", "heldout"], *, max_context_tokens: int | None = None
    ) -> None:
        self.num_following_tokens = 0
        self.carries_rest = False
        self._remote = RemoteFolder(str(path)) if is_remote(path) else None
        self.path = expand_home(path) if self._remote is None else self._remote.path
        self.split = split
        self.max_context_tokens = max_context_tokens
        self.manifest = read_manifest(self.path)
        self._sha256 = self.manifest.sha256[split]  # by file
        if self._remote is not None:
            self._remote.fetch_split(split)
        elif NUM_POSITIONS_FILE not in self._sha256:
            raise ValueError(
                f"{self.path / MANIFEST_FILE}: no checksum of {split}/{NUM_POSITIONS_FILE}; "
                "make the task folder again with `rpt prepare`"
            )
        elif (self.path / split / NUM_POSITIONS_FILE).is_file():
            check_file(self.path / split / NUM_POSITIONS_FILE, self._sha256[NUM_POSITIONS_FILE])
        chunk_sizes, num_positions = check_split(self.path / split, has_chunks=self._remote is None)
        self.chunk_sizes = chunk_sizes  # documents of each shard
        self._chunk_ends = np.cumsum(chunk_sizes)  # [C] documents
        self._checked_chunks: set[int] = set()
        self.num_positions: NDArray[np.int32] = num_positions  # [D]
        self._dataset = open_items(self.path / split)
        self.document = lru_cache(maxsize=CACHED_DOCUMENTS)(self._read)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.num_positions)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(self.path / "tokenizer"), flag="task folder's tokenizer")

    @cached_property
    def token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    @cached_property
    def tokenizer_hash(self) -> str:
        """The hash that a policy's tokenizer must match.

        Raises ValueError if the folder's tokenizer is not the one that its manifest names.
        """
        if not has_hash(self.tokenizer, self.manifest.tokenizer_hash):
            raise ValueError(
                f"{self.path}: tokenizer/ is not the tokenizer that the manifest names; "
                "make the task folder again with `rpt prepare`"
            )
        return tokenizer_hash(self.tokenizer)

    @cached_property
    def last_position(self) -> int:
        """The largest position of any document, which is the length of the longest untruncated context."""
        stored = self.manifest.last_position(self.split)
        # Folders from before this count existed are read once as a whole.
        return (
            stored
            if stored is not None
            else max(int(self._read(index)["positions"].max()) for index in range(len(self)))
        )

    @property
    def places(self) -> str:
        """What the folder's tasks ask about (``Objective.places``)."""
        return self.manifest.places

    @cached_property
    def layout(self) -> str:
        """Fingerprint of the corpus's division into documents, positions and shards.

        It covers only what is known without reading the documents.
        """
        settings = {
            name: value
            for name, value in self.manifest.settings.items()
            if name not in NOT_OF_THE_LAYOUT
            # Defaults count as if the setting did not exist yet.
            and not (name in LATER_SETTINGS and value == LATER_SETTINGS[name])
        }
        digest = hashlib.sha256(json.dumps([self.chunk_sizes, settings], sort_keys=True).encode())
        digest.update(self.num_positions.astype("<i4").tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def _chunk_names(self) -> list[str]:
        chunks, _ = read_index(self.path / self.split)
        return [chunk.filename for chunk in chunks]

    def _check_chunk(self, chunk: int) -> None:
        """Check a chunk when the first of its documents is needed.

        A corpus that streams is therefore never read as a whole before it is used.
        """
        if chunk not in self._checked_chunks:
            name = self._chunk_names[chunk]
            if self._remote is not None:
                self._remote.fetch(self.split, name)
            elif name not in self._sha256:
                raise ValueError(
                    f"{self.path / self.split / INDEX_FILE} names a chunk {name!r}, "
                    f"which {MANIFEST_FILE} does not hold; copy the folder again from where it came from, "
                    "or make it again with `rpt prepare`"
                )
            else:
                check_file(self.path / self.split / name, self._sha256[name])
            self._checked_chunks.add(chunk)

    def _read(self, document_index: int) -> Item:
        """Read one stored item (docs/architecture.md). ``document(i)`` caches the most recent ones."""
        self._check_chunk(int(np.searchsorted(self._chunk_ends, document_index, side="right")))
        return decode_item(self._dataset[document_index])

    def token_ids(self, document_index: int) -> TokenIds:
        """Return all tokens of a document."""
        return tuple(self.document(document_index)["token_ids"].tolist())

    def task(self, document_index: int, k: int) -> TokenTask:
        """Build the task at the ``k``-th stored position of a document."""
        item = self.document(document_index)
        position = int(item["positions"][k])
        token_ids, rows, materials = item["token_ids"], item.get(FIELDS), item.get(MATERIAL)
        start = 0 if self.max_context_tokens is None else max(0, position - self.max_context_tokens)
        continuation_ids = tuple(token_ids[position : position + self.manifest.answer_reach].tolist())
        return TokenTask(
            task_id=f"{item['doc_id']}:{position}",
            doc_id=item["doc_id"],
            position=position,
            context_ids=tuple(token_ids[start:position].tolist()),
            continuation_ids=continuation_ids,
            continuation=tuple(self.token_bytes[token] for token in continuation_ids),
            entropy=float(item["entropy"][k]),
            true_prob=float(item["true_prob"][k]),
            true_rank=int(item["true_rank"][k]),
            answerable=bool(item["answerable"][k]),
            fields={} if rows is None else rows[k],
            following_ids=tuple(token_ids[position : position + self.num_following_tokens].tolist()),
            rest_ids=tuple(token_ids[position:].tolist()) if self.carries_rest else (),
            material="" if materials is None else materials[k],
        )

    def candidates(self, document_index: int, k: int) -> tuple[TokenIds, tuple[float, ...]]:
        """Return the proxy's most likely next tokens at a stored position, and their probabilities.

        The most likely token comes first.
        """
        item = self.document(document_index)
        return tuple(item["candidate_ids"][k].tolist()), tuple(item["candidate_probs"][k].tolist())
