"""What an objective stores with its tasks when a folder is prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpt_lightning.data.prepare.position_rule import LeftOut, PositionRule
from rpt_lightning.data.prepare.prepare_command import prepare
from rpt_lightning.data.prepare.proxy_scores import DocumentScores
from rpt_lightning.data.sources.corpus import DocstringSource
from rpt_lightning.data.store.item_format import decode_item, encode_item, item_digest
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.split_documents import SplitDocuments
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Task


class Neighbours(Objective):
    """Stores which documents it saw. It has nothing for positions that 5 divides, and no answer at 7."""

    has_material = True

    def may_ask(self, tokens, position):
        return position % 2 == 1

    def is_answerable(self, tokens, position, *, reach):
        return position != 7

    def material(self, documents: SplitDocuments, number: int, position: int) -> str | None:
        if position % 5 == 0:
            return None
        return json.dumps([documents.doc_ids[number], position, sorted(documents.doc_ids), "é\ud7ff{}"])

    def truth(self, task: Task) -> tuple[bytes, ...]:
        return (b"x",)


def rule(**settings: Any) -> PositionRule:
    fixed = {"entropy_threshold": 0.5, "min_context": 1, "answer_reach": 1, "keep_unanswerable": False}
    return PositionRule(**(fixed | settings), objective=Neighbours())


def items(tokenizer, **settings):
    tokens = TokenBytes(tokenizer)
    ids = [
        np.array(tokens.encode_plain(text), dtype=np.int32)[:12] for text in ("one two three four five",) * 2
    ]
    documents = SplitDocuments(["a", "b"], ids, [False, False], tokens)
    scores = DocumentScores(
        entropy=np.ones(12, np.float32),
        true_prob=np.full(12, 0.5, np.float32),
        true_rank=np.zeros(12, np.int32),
        candidate_ids=np.zeros((12, 16), np.int32),
        candidate_probs=np.zeros((12, 16), np.float32),
    )
    return rule(**settings).item(documents, 1, ids[1], scores)


def test_a_position_without_material_is_left_out_and_counted(tiny_tokenizer):
    item, left_out = items(tiny_tokenizer)
    assert item["positions"].tolist() == [1, 3, 9, 11]  # 5 has none, 7 no answer
    assert [json.loads(text)[:2] for text in item["material"]] == [["b", p] for p in (1, 3, 9, 11)]
    assert left_out == LeftOut(unanswerable=1, without_material=1)
    kept, left_out = items(tiny_tokenizer, keep_unanswerable=True)
    assert kept["positions"].tolist() == [1, 3, 7, 9, 11]
    assert kept["answerable"].tolist() == [1, 1, 0, 1, 1]
    assert len(kept["material"]) == 5


def test_it_is_stored_and_read_back(tiny_tokenizer):
    item, _ = items(tiny_tokenizer)
    assert decode_item(encode_item(item))["material"] == item["material"]
    other = item | {"material": [*item["material"][:-1], "other"]}
    assert item_digest(other) != item_digest(item)
    for wrong in ([], item["material"][:-1], [1] * 4, {"a": "b"}, "four"):
        with pytest.raises(ValueError, match="what its objective stored is not one text per position"):
            decode_item(encode_item(item | {"material": wrong}))


def test_a_folder_holds_it_and_splits_do_not_see_each_other(tiny_model_dir, tmp_path: Path, capfd):
    folder = tmp_path / "tasks"
    prepare(
        DocstringSource("unittest"),
        str(folder),
        tokenizer=str(tiny_model_dir),
        proxy=str(tiny_model_dir),
        objective=Neighbours(),
        entropy_threshold=0.5,
        min_context=4,
        max_tokens_per_document=64,
        max_documents=24,
        heldout_documents=4,
        window=256,
        overlap=64,
        precision="32-true",
    )
    seen = {}
    for split, num in (("train", 20), ("heldout", 4)):
        opened = TaskFolder(folder, split)
        assert len(opened) == num
        tasks = [opened.task(d, k) for d in range(num) for k in range(opened.num_positions[d])]
        for task in tasks:
            doc_id, position, ids, text = json.loads(task.material)
            assert (doc_id, position, text) == (task.doc_id, task.position, "é\ud7ff{}")
            seen[split] = set(ids)
    assert len(seen["train"]) == 20
    assert len(seen["heldout"]) == 4
    assert not seen["train"] & seen["heldout"]
    manifest = json.loads((folder / "manifest.json").read_text())
    counts = [manifest["splits"][split]["without_material"] for split in ("train", "heldout")]
    assert min(counts) > 0
    places = f"{Neighbours.__module__}.Neighbours"
    assert f"left out {sum(counts):,} positions for which {places} has no material" in capfd.readouterr().out


def test_folders_of_other_objectives_are_as_before(tiny_task_dir):
    opened = TaskFolder(tiny_task_dir, "train")
    assert "material" not in opened.document(0)
    assert opened.task(0, 0).material == ""
    assert "without_material" not in (tiny_task_dir / "manifest.json").read_text()
