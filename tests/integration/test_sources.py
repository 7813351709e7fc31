"""Every source of text, from `rpt prepare` to a step of training."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_run import flat_weights, quiet_trainer

from rpt_lightning import cli
from rpt_lightning.data.modules.text import TextDataModule
from rpt_lightning.data.prepare.prepare_command import prepare
from rpt_lightning.data.sources.corpus import (
    CorpusSource,
    DocstringSource,
    HuggingFaceSource,
    JsonlSource,
    ParquetSource,
    TextFilesSource,
)
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.policy.model import Policy
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.types import Document

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RNG = random.Random(0)
TEXTS = [" ".join("".join(RNG.choices("abcdefghijklmnop", k=5)) for _ in range(10)) for _ in range(8)]


def jsonl_source(folder: Path) -> CorpusSource:
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return JsonlSource(str(folder / "corpus.jsonl"), template="{text}")


def parquet_source(folder: Path) -> CorpusSource:
    pq.write_table(pa.table({"text": TEXTS}), folder / "corpus.parquet")
    return ParquetSource(str(folder / "corpus.parquet"), template="{text}")


def text_files_source(folder: Path) -> CorpusSource:
    for number, text in enumerate(TEXTS):
        (folder / f"caf\u00e9 {number}.txt").write_text(text)
    return TextFilesSource(f"{folder}/*.txt")


def hugging_face_source(folder: Path) -> CorpusSource:
    pytest.importorskip("datasets")
    jsonl_source(folder)
    return HuggingFaceSource(str(folder), template="{text}")


def docstring_source(folder: Path) -> CorpusSource:
    return DocstringSource("json", min_chars=40)


SOURCES = {
    JsonlSource: jsonl_source,
    ParquetSource: parquet_source,
    TextFilesSource: text_files_source,
    HuggingFaceSource: hugging_face_source,
    DocstringSource: docstring_source,
}


class WithFields(CorpusSource):
    """Another source's documents, with their files' names as a field."""

    def __init__(self, source: CorpusSource) -> None:
        self.source = source

    def documents(self) -> Iterator[Document]:
        return (
            replace(document, fields={"name": Path(document.doc_id).name})
            for document in self.source.documents()
        )

    def describe(self) -> dict[str, Any]:
        return self.source.describe()


def leaves(base: type) -> set[type]:
    """Return the final classes of the package, without those of tests."""
    return {
        leaf
        for one in base.__subclasses__()
        for leaf in (leaves(one) or {one})
        if leaf.__module__.startswith("rpt_lightning.data.sources.corpus")
    }


def test_no_source_is_forgotten() -> None:
    assert leaves(CorpusSource) == set(SOURCES)


def prepared(source: CorpusSource, folder: Path, model_dir: Path) -> Path:
    prepare(
        source,
        str(folder),
        tokenizer=str(model_dir),
        proxy=str(model_dir),
        entropy_threshold=0.5,
        min_context=4,
        max_tokens_per_document=48,
        heldout_documents=2,
        window=64,
        overlap=16,
        precision="32-true",
    )
    return folder


@pytest.mark.parametrize("kind", SOURCES, ids=lambda kind: kind.__name__)
def test_a_source_reaches_a_step(kind: type, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    source = SOURCES[kind](tmp_path / "corpus")
    folder = prepared(source, tmp_path / "tasks", tiny_model_dir)
    known = {document.doc_id for document in source.documents()}
    stored = [TaskFolder(folder, split).document(0)["doc_id"] for split in ("train", "heldout")]
    assert known >= set(stored)
    module = NTPModule(
        Policy(str(tiny_model_dir)), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    )
    untrained = Policy(str(tiny_model_dir))
    untrained.materialize()
    trainer = quiet_trainer(tmp_path / "run", 1, [], enable_checkpointing=False, limit_val_batches=1)
    trainer.fit(module, TextDataModule(str(folder), documents_per_step=2, num_eval_tasks=4))
    assert trainer.global_step == 1
    assert not torch.equal(
        flat_weights(module),
        torch.cat([parameter.detach().flatten() for parameter in untrained.parameters()]),
    )


def test_a_folder_of_text_files_reaches_a_step_of_the_command(
    tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The ids are paths of existing files, as own-text.yaml makes them."""
    (tmp_path / "corpus").mkdir()
    folder = prepared(WithFields(text_files_source(tmp_path / "corpus")), tmp_path / "tasks", tiny_model_dir)
    flags = {
        "--config": CONFIGS / "debug.yaml", "--model.policy.path": tiny_model_dir, "--data.task_dir": folder,
        "--data.tasks_per_step": 2, "--data.num_eval_tasks": 2, "--trainer.max_steps": 1,
        "--trainer.val_check_interval": 1, "--trainer.default_root_dir": tmp_path / "run",
    }  # fmt: skip
    status = cli.main(["fit", *(str(word) for flag in flags.items() for word in flag)])
    assert status == 0, capfd.readouterr()
    (records,) = (tmp_path / "run" / "validation").glob("*.jsonl")
    rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    assert rows
    assert all(
        Path(row["doc_id"]).is_file() and row["fields"] == {"name": Path(row["doc_id"]).name} for row in rows
    )
