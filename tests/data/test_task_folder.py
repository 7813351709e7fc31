from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpt_lightning.data.store.shards import folder_checksums, write_split
from rpt_lightning.data.store.task_folder import TaskFolder

Write = Callable[..., Path]


def test_a_task_is_the_position_with_its_bytes(write_task_folder: Write, tmp_path: Path) -> None:
    folder = TaskFolder(write_task_folder(tmp_path / "t", [3, 6]), "train")
    task = folder.task(1, 2)
    assert task.task_id == "train-1:3"
    assert task.context_ids == (40, 41, 42)
    assert task.continuation_ids == (43, 44, 45)  # answer_reach is 3
    assert task.continuation == tuple(folder.token_bytes[token] for token in (43, 44, 45))
    assert (task.position, task.true_rank, task.answerable) == (3, 2, True)
    assert task.entropy == pytest.approx(0.6 + 1.4 * 2 / 5)
    assert folder.task(1, 5).continuation_ids == (46,)  # the document ends
    assert folder.num_positions.tolist() == [3, 6]
    assert folder.token_ids(0) == (40, 41, 42, 43)


def test_long_contexts_are_cut_on_the_left(write_task_folder: Write, tmp_path: Path) -> None:
    folder = TaskFolder(write_task_folder(tmp_path / "t", [6]), "train", max_context_tokens=2)
    assert folder.task(0, 0).context_ids == (40,)
    assert folder.task(0, 4).context_ids == (43, 44)
    assert folder.task(0, 4).position == 5


def test_a_task_carries_the_rest_of_its_document_on_request(write_task_folder: Write, tmp_path: Path) -> None:
    folder = TaskFolder(write_task_folder(tmp_path / "t", [6]), "train", max_context_tokens=2)
    assert folder.task(0, 4).rest_ids == ()
    folder.carries_rest = True
    task = folder.task(0, 4)
    assert (task.context_ids, task.rest_ids, task.following_ids) == ((43, 44), (45, 46), ())


def test_the_prepared_folder_reads_back(prepared_dir: Path) -> None:
    folder = TaskFolder(prepared_dir, "heldout")
    for document in range(len(folder)):
        ids = folder.token_ids(document)
        for k in range(int(folder.num_positions[document])):
            task = folder.task(document, k)
            assert task.context_ids + task.continuation_ids == ids[: task.position + 8]
            assert b"".join(task.continuation) == folder.token_bytes.join(
                ids[task.position : task.position + 8]
            )


def test_what_is_not_a_task_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: not a task folder \(manifest.json is missing\)"):
        TaskFolder(tmp_path / "nowhere", "train")


def test_damage_is_found_when_the_folder_is_opened(write_task_folder: Write, tmp_path: Path) -> None:
    def opened(damage: Callable[[Path], object], name: str) -> TaskFolder:
        path = write_task_folder(tmp_path / name, [2] * 20, chunk_bytes="4KB")
        damage(path)
        return TaskFolder(path, "train")

    assert len(opened(lambda path: None, "fine").chunk_sizes) > 1
    with pytest.raises(ValueError, match=r"chunk-0-1\.bin is missing: the task folder is incomplete"):
        opened(lambda path: (path / "train/chunk-0-1.bin").unlink(), "missing")
    with pytest.raises(ValueError, match=r"chunk-0-0\.bin has 5 bytes instead of"):
        opened(lambda path: (path / "train/chunk-0-0.bin").write_bytes(b"12345"), "short")
    with pytest.raises(ValueError, match="not a readable split"):
        opened(lambda path: (path / "train/num_positions.npy").unlink(), "counts")
    with pytest.raises(ValueError, match=r"num_positions\.npy is damaged: its SHA-256"):
        opened(lambda path: np.save(path / "train/num_positions.npy", np.ones(3, np.int32)), "other_counts")
    with pytest.raises(ValueError, match="not a readable split"):
        opened(lambda path: (path / "train/index.json").write_text("{"), "index")
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest that this version reads"):
        opened(lambda path: (path / "manifest.json").write_text('{"format": 99}'), "version")


def test_pickle_is_never_read(write_task_folder: Write, tmp_path: Path) -> None:
    path = write_task_folder(tmp_path / "t", [2])
    index = json.loads((path / "train/index.json").read_text())
    for name in ("pickle", "tensor", "no_header_tensor:1", "graph"):
        index["config"]["data_format"][3] = name
        (path / "train/index.json").write_text(json.dumps(index))
        with pytest.raises(
            ValueError, match=f"index.json names the serializer '{name.split(':')[0]}'; only str, numpy"
        ):
            TaskFolder(path, "train")


def test_every_item_is_arrays_even_where_its_text_names_a_file(
    write_task_folder: Write, tmp_path: Path
) -> None:
    """litdata declines to store the path of an existing file as text, and would pickle it."""
    ids = [str(Path(__file__)), "", "a\u2028é \U0001f600", "no file", str(tmp_path), "picture.png"]
    path = write_task_folder(tmp_path / "t", [2] * len(ids), doc_ids=ids)
    formats = json.loads((path / "train/index.json").read_text())["config"]["data_format"]
    assert {name.split(":")[0] for name in formats} == {"numpy", "no_header_numpy"}
    folder = TaskFolder(path, "train")
    assert [folder.document(index)["doc_id"] for index in range(len(ids))] == ids
    assert folder.task(0, 1).task_id == f"{ids[0]}:2"


def test_folders_of_the_earlier_format_are_read_and_have_the_same_chunks(
    write_task_folder: Write, tmp_path: Path
) -> None:
    from litdata.streaming.writer import BinaryWriter

    new = TaskFolder(write_task_folder(tmp_path / "new", [2, 3]), "train")
    path = write_task_folder(tmp_path / "old", [2, 3], format=1)
    (path / "train/chunk-0-0.bin").unlink()
    (path / "train/index.json").unlink()
    writer = BinaryWriter(str(path / "train"), chunk_bytes="64MB")
    for index in range(2):
        writer.add_item(index, dict(new.document(index)))  # with the id as text
    writer.done()
    writer.merge()
    assert json.loads((path / "train/index.json").read_text())["config"]["data_format"][0] == "str"
    assert (path / "train/chunk-0-0.bin").read_bytes() == (new.path / "train/chunk-0-0.bin").read_bytes()
    old = TaskFolder(path, "train")
    assert [old.task(1, k) for k in range(3)] == [new.task(1, k) for k in range(3)]
    assert old.layout == new.layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_id": b"bytes"}, "the id of document b'bytes' is a bytes, but must be text"),
        (
            {"doc_id": "caf\udce9.txt"},
            r"is not Unicode at character 3; a file whose name is in another encoding must be renamed",
        ),
        (
            {"entropy": np.zeros(2)},
            r"document 'd': entropy is float64 \[1 dimensions\], but must be an array of float32",
        ),
        ({"positions": [1, 2]}, r"document 'd': positions is list, but must be an array of int32"),
        ({"true_prob": np.array([None, None])}, "true_prob is object"),
        ({"more": np.zeros(2)}, "holds doc_id, .*, and not .*more"),
    ],
)
def test_what_is_not_an_item_is_not_stored(
    write_task_folder: Write, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    item = TaskFolder(write_task_folder(tmp_path / "t", [2]), "train").document(0) | {"doc_id": "d"}
    with pytest.raises(ValueError, match=message):
        write_split(tmp_path / "split", [item | change], chunk_bytes="64MB")


def test_pickled_counts_are_never_read(write_task_folder: Write, tmp_path: Path) -> None:
    path = write_task_folder(tmp_path / "t", [2])
    np.save(path / "train/num_positions.npy", np.array([object()], dtype=object), allow_pickle=True)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["train"] = folder_checksums(path / "train")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not a readable split"):
        TaskFolder(path, "train")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (
            "settings",
            None,
            r"\(settings: there is no such entry\); make the task folder again with `rpt prepare`",
        ),
        ("settings", [], r"settings is \[\], but must be an object"),
        ("settings.tokenizer", 7, r"settings\.tokenizer is 7, but must be text"),
        ("corpus.sha256", None, r"corpus\.sha256: there is no such entry"),
        ("answer_reach", "3", r"answer_reach is '3', but must be a whole number"),
        ("answer_reach", 0, r"answer_reach is 0"),
        ("proxy", ["models/tiny"], r"proxy is \['models/tiny'\], but must be text"),
        ("sha256", None, r"sha256: there is no such entry; without checksums damage would go unnoticed"),
        ("sha256", "null", r"sha256 is 'null', but must be an object"),
        ("sha256.train", None, r"sha256\.train: there is no such entry; without checksums"),
        (
            "sha256.train",
            {"num_positions.npy": None},
            r"sha256\.train\.num_positions\.npy is None, but must be a SHA-256",
        ),
        ("sha256.train", {}, r"no checksum of train/num_positions\.npy"),
        (
            "splits",
            {"train": {"last_position": "9"}},
            r"splits\.train\.last_position is '9', but must be a position",
        ),
        ("splits", {"train": 5}, r"splits\.train is 5, but must be an object"),
    ],
)
def test_a_manifest_that_was_edited_is_named(
    entry: str, value: Any, message: str, write_task_folder: Write, tmp_path: Path
) -> None:
    path = write_task_folder(tmp_path / "t", [2])
    manifest = json.loads((path / "manifest.json").read_text())
    place = manifest
    *outer, last = entry.split(".")
    for name in outer:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{message}"):
        TaskFolder(path, "train")


@pytest.mark.parametrize(
    "content", ["[]", "7", '{"format": 1, "settings": null}', '{"format": 1, "sha256": null}', '"text"']
)
def test_what_is_no_manifest_is_named(content: str, write_task_folder: Write, tmp_path: Path) -> None:
    path = write_task_folder(tmp_path / "t", [2])
    (path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest that this version reads"):
        TaskFolder(path, "train")


def test_a_tokenizer_that_is_not_the_manifests(write_task_folder: Write, tmp_path: Path) -> None:
    folder = TaskFolder(write_task_folder(tmp_path / "t", [2], tokenizer_hash="0" * 16), "train")
    with pytest.raises(ValueError, match="tokenizer/ is not the tokenizer that the manifest names"):
        _ = folder.tokenizer_hash


@pytest.mark.parametrize("damage", ["a flipped byte", "cut"])
def test_a_damaged_shard_is_named_before_anything_is_read_from_it(tiny_task_dir, tmp_path, damage):
    folder = shutil.copytree(tiny_task_dir, tmp_path / "tasks")
    assert TaskFolder(folder, "train").document(0)["doc_id"]
    (shard,) = (folder / "train").glob("*.bin")
    content = bytearray(shard.read_bytes())
    content[-40] ^= 0x10
    shard.write_bytes(content[:-9] if damage == "cut" else content)
    with pytest.raises(ValueError, match=rf"{shard.name} (is damaged|has \d+ bytes instead of)"):
        TaskFolder(folder, "train").document(0)


def test_a_damaged_count_of_positions_is_named(tiny_task_dir, tmp_path):
    folder = shutil.copytree(tiny_task_dir, tmp_path / "tasks")
    counts = folder / "train" / "num_positions.npy"
    content = bytearray(counts.read_bytes())
    content[-1] ^= 0x01
    counts.write_bytes(content)
    with pytest.raises(ValueError, match=r"num_positions.npy is damaged: its SHA-256"):
        TaskFolder(folder, "train")


def test_a_shard_that_the_manifest_does_not_hold_is_named(tiny_task_dir, tmp_path):
    folder = shutil.copytree(tiny_task_dir, tmp_path / "tasks")
    (shard,) = (folder / "train").glob("*.bin")
    shard.rename(shard.with_name("other.bin"))
    index = folder / "train" / "index.json"
    index.write_text(index.read_text().replace(shard.name, "other.bin"))
    with pytest.raises(
        ValueError,
        match=r"index\.json names a chunk 'other\.bin', which manifest\.json does not hold; .* `rpt prepare`",
    ):
        TaskFolder(folder, "train").document(0)
