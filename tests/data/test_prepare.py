from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from folder_contents import Prepare, items, stored
from transformers import AutoTokenizer

from rpt_lightning.data.prepare.prepare_command import prepare as prepare_function
from rpt_lightning.data.sources.corpus import CorpusSource, JsonlSource, TextFilesSource
from rpt_lightning.data.store import shards
from rpt_lightning.data.store.manifest import read_manifest, write_manifest
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.box import extract_prediction
from rpt_lightning.types import Document


def test_the_folder_holds_what_the_manifest_says(prepared_dir: Path, corpus_path: Path) -> None:
    manifest = json.loads((prepared_dir / "manifest.json").read_text())
    assert manifest["corpus"] | {"sha256": ""} == {
        "sha256": "",
        "documents_read": 20,
        "too_short": 1,
        "inexpressible": 0,
        "exact_duplicates": 1,
        "components": 17,
        "largest_component": 2,
        "siblings_of_heldout_documents": 0,
        "not_sampled": 0,
    }
    assert manifest["shared_spans_between_splits"] == 0
    train, heldout = items(prepared_dir, "train"), items(prepared_dir, "heldout")
    assert len(heldout) == manifest["splits"]["heldout"]["documents"] == 4
    assert len(train) == manifest["splits"]["train"]["documents"] == 14
    assert {"corpus.jsonl:5", "corpus.jsonl:18"} <= set(train)  # near duplicates form the largest component
    for split, contents in (("train", train), ("heldout", heldout)):
        assert (
            sum(len(item["positions"]) for item in contents.values())
            == manifest["splits"][split]["positions"]
        )
        histogram = manifest["splits"][split]["entropy_histogram"]
        assert sum(histogram["scored_positions"]) == manifest["splits"][split]["scored_positions"]
        assert len(histogram["scored_positions"]) == len(histogram["bin_edges_nats"]) - 1
    assert (prepared_dir / "histogram.png").read_bytes()[:4] == b"\x89PNG"
    assert not prepared_dir.with_name(prepared_dir.name + ".partial").exists()


def test_a_manifest_is_written_as_it_was_read(prepared_dir: Path, tmp_path: Path) -> None:
    manifest = read_manifest(prepared_dir)
    assert (manifest.corpus.too_short, manifest.splits["heldout"].documents) == (1, 4)
    write_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_bytes() == (prepared_dir / "manifest.json").read_bytes()


def test_no_thirteen_tokens_stand_in_both_splits(prepared_dir: Path) -> None:
    """Count the spans again from the files on disk, token by token."""
    spans: dict[str, set[tuple[int, ...]]] = {}
    for split in ("train", "heldout"):
        rows = [item["token_ids"].tolist() for item in items(prepared_dir, split).values()]
        spans[split] = {tuple(row[start : start + 13]) for row in rows for start in range(len(row) - 12)}
    assert spans["train"]
    assert spans["heldout"]
    assert not spans["train"] & spans["heldout"]


def test_items_hold_the_rule_and_the_text(prepared_dir: Path, corpus_path: Path) -> None:
    texts = {
        f"corpus.jsonl:{number}": json.loads(line)["problem"]
        for number, line in enumerate(corpus_path.read_text().splitlines(), start=1)
    }
    tokens = TaskFolder(prepared_dir, "train").token_bytes
    for split, threshold in (("train", 1.0), ("heldout", 0.5)):
        for doc_id, item in items(prepared_dir, split).items():
            assert tokens.join(item["token_ids"].tolist()).decode() == texts[doc_id]
            assert not any(tokens.is_special(token) for token in item["token_ids"].tolist())
            assert item["positions"].min() >= 8
            assert (np.diff(item["positions"]) > 0).all()
            assert item["entropy"].min() > threshold
            assert item["candidate_ids"].shape == (len(item["positions"]), 16)
            ranked = item["true_rank"] < 16
            truth = item["token_ids"][item["positions"]]
            assert (item["candidate_ids"][ranked, item["true_rank"][ranked]] == truth[ranked]).all()
            for position, answerable in zip(
                item["positions"].tolist(), item["answerable"].tolist(), strict=True
            ):
                pieces = [tokens[token] for token in item["token_ids"][position : position + 8].tolist()]
                answers = [b"".join(pieces[: count + 1]) for count in range(len(pieces))]
                boxed = [
                    extract_prediction(b"</think>\\boxed{" + answer + b"}") == answer for answer in answers
                ]
                assert bool(answerable) == any(boxed)


def test_unanswerable_positions_are_kept_where_they_are_measured(
    prepared_dir: Path, prepare_small: Prepare, tmp_path: Path
) -> None:
    kept = prepare_small(tmp_path / "kept", keep_unanswerable=True)
    counts = json.loads((prepared_dir / "manifest.json").read_text())["splits"]
    assert counts["train"]["unanswerable"] > 0
    assert all(item["answerable"].all() for item in items(prepared_dir).values())
    extra = sum(len(item["positions"]) for item in items(kept).values()) - counts["train"]["positions"]
    assert extra == counts["train"]["unanswerable"]
    flagged = sum(int((item["answerable"] == 0).sum()) for item in items(prepared_dir, "heldout").values())
    assert flagged == counts["heldout"]["unanswerable"] > 0
    ceiling = counts["heldout"]["bands"]["easy"]["accuracy_ceiling"]
    assert ceiling == pytest.approx(1 - flagged / counts["heldout"]["positions"], abs=1e-4)


def test_the_learnability_band_is_for_training_only(
    prepared_dir: Path, prepare_small: Prepare, tmp_path: Path
) -> None:
    banded = prepare_small(tmp_path / "band", min_true_prob=0.002, max_true_prob=0.01)
    probs = np.concatenate([item["true_prob"] for item in items(banded).values()])
    assert probs.min() >= 0.002
    assert probs.max() <= 0.01
    assert (
        stored(banded)["chunks"]["heldout/chunk-0-0.bin"]
        == stored(prepared_dir)["chunks"]["heldout/chunk-0-0.bin"]
    )
    assert (
        len(probs) < json.loads((prepared_dir / "manifest.json").read_text())["splits"]["train"]["positions"]
    )


def test_random_positions_do_not_look_at_the_entropy(prepare_small: Prepare, tmp_path: Path) -> None:
    everywhere = {"entropy_threshold": -1.0, "heldout_entropy_threshold": -1.0}
    all_of_it = prepare_small(tmp_path / "all", **everywhere)
    drawn = prepare_small(tmp_path / "drawn", random_share=0.25)
    again = prepare_small(tmp_path / "again", random_share=0.25)
    other = prepare_small(tmp_path / "other", random_share=0.25, seed=1)

    def positions(folder: Path) -> dict[tuple[str, int], float]:
        return {
            (doc_id, position): entropy
            for split in ("train", "heldout")
            for doc_id, item in items(folder, split).items()
            for position, entropy in zip(item["positions"].tolist(), item["entropy"].tolist(), strict=True)
        }

    whole, chosen = positions(all_of_it), positions(drawn)
    assert chosen == positions(again)
    assert chosen.items() <= whole.items()
    # Five standard deviations around a quarter of them, above and below the median entropy alike.
    median = float(np.median(list(whole.values())))
    for side in (lambda entropy: entropy <= median, lambda entropy: entropy > median):
        there = sum(side(entropy) for entropy in whole.values())
        here = sum(side(entropy) for entropy in chosen.values())
        assert abs(here - there / 4) < 5 * (there * 3 / 16) ** 0.5
    # A position is drawn by the seed, its document and its place.
    both = positions(other).keys() & chosen.keys()
    assert 0.1 < len(both) / len(chosen) < 0.4
    assert json.loads((drawn / "manifest.json").read_text())["settings"]["random_share"] == 0.25


def test_an_inferable_truth_is_among_the_candidates(
    prepared_dir: Path, prepare_small: Prepare, tmp_path: Path
) -> None:
    folder = prepare_small(tmp_path / "rank", max_true_prob=0.01, max_true_rank=15)
    number = 0
    for doc_id, item in items(folder).items():
        truth = item["token_ids"][item["positions"]]
        assert (item["candidate_ids"] == truth[:, None]).any(1).all()
        assert item["true_prob"].max() <= 0.01
        everything = items(prepared_dir)[doc_id]
        passes = (everything["true_rank"] < 16) & (everything["true_prob"] <= 0.01)
        assert item["positions"].tolist() == everything["positions"][passes].tolist()
        number += len(truth)
    assert number > 0
    assert (
        stored(folder)["chunks"]["heldout/chunk-0-0.bin"]
        == (stored(prepared_dir)["chunks"]["heldout/chunk-0-0.bin"])
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_true_rank": -1},
            r"--max_true_rank=-1: give a number of at least 0 \(0: the most likely token",
        ),
        ({"min_true_prob": float("nan")}, r"--min_true_prob nan: must be below --max_true_prob 1\.0"),
        ({"min_true_prob": 0.5, "max_true_prob": 0.5}, r"--min_true_prob 0\.5: must be below"),
    ],
)
def test_a_band_that_is_none(
    settings: dict[str, float], message: str, prepare_small: Prepare, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_small(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_before_the_rank_could_be_limited_has_no_limit(
    prepared_dir: Path, prepare_small: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(prepared_dir, tmp_path / "old")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["settings"].pop("max_true_rank") is None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    # A run on one of the folders can resume on the other.
    assert TaskFolder(folder, "train").layout == TaskFolder(prepared_dir, "train").layout
    prepare_small(folder)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"\(max_true_rank None instead of 15\)"):
        prepare_small(folder, max_true_rank=15)


def test_documents_that_were_cut_leave_out_their_last_positions(
    prepare_small: Prepare, tmp_path: Path
) -> None:
    """At every position of a truncated document eight tokens of truth are known."""
    folder = prepare_small(tmp_path / "cut", max_tokens_per_document=40, answer_reach=8)
    cut = [item for item in items(folder).values() if len(item["token_ids"]) == 40]
    assert len(cut) > 5
    assert max(item["positions"].max() for item in cut) == 32


def test_a_sample_of_the_documents(prepare_small: Prepare, tmp_path: Path) -> None:
    folder = prepare_small(tmp_path / "sample", max_documents=9)
    assert len(items(folder)) == 5
    assert len(items(folder, "heldout")) == 4
    assert json.loads((folder / "manifest.json").read_text())["corpus"]["not_sampled"] == 9


def test_benchmark_overlap_is_removed(
    prepared_dir: Path, prepare_small: Prepare, corpus_path: Path, tmp_path: Path
) -> None:
    text = json.loads(corpus_path.read_text().splitlines()[6])["problem"]
    benchmark = tmp_path / "benchmark.jsonl"
    benchmark.write_text(json.dumps({"question": {"parts": ["Is it true? " + text]}, "answer": "42"}) + "\n")
    folder = prepare_small(tmp_path / "clean", benchmark_files=[str(benchmark)])
    everything = items(folder) | items(folder, "heldout")
    assert "corpus.jsonl:7" in items(prepared_dir) | items(prepared_dir, "heldout")
    assert "corpus.jsonl:7" not in everything
    assert len(everything) == 17
    with pytest.raises(ValueError, match=r"--benchmark_files .*nowhere: there is no such file"):
        prepare_small(tmp_path / "other", benchmark_files=[str(tmp_path / "nowhere")])


def test_what_cannot_be_read_back_is_not_published(
    prepare_small: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a writer that exchanges two values, as one that guesses formats might."""
    original = shards.encode_item
    monkeypatch.setattr(shards, "encode_item", lambda item: original(item) | {"entropy": item["true_prob"]})
    with pytest.raises(
        RuntimeError,
        match=r"--output_dir .*out: what was written is not what is read back.*train/ holds documents",
    ):
        prepare_small(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shards, "encode_item", original)
    assert items(prepare_small(tmp_path / "out"))


def test_a_finished_folder_that_cannot_be_read_is_not_accepted(
    prepared_dir: Path, prepare_small: Prepare, tmp_path: Path
) -> None:
    """Earlier versions made such folders of text files: with pickles."""
    folder = shutil.copytree(prepared_dir, tmp_path / "old")
    index = folder / "heldout/index.json"
    config = json.loads(index.read_text())
    config["config"]["data_format"][0] = "pickle"
    index.write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match=r"--output_dir .*old: a task folder .* cannot be read: remove it "
        r".*names the serializer 'pickle'",
    ):
        prepare_small(folder)
    assert index.is_file()


def test_a_document_whose_id_is_no_text_is_refused_before_anything_is_scored(
    prepare_small: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(TextFilesSource):
        def documents(self) -> Iterator[Document]:
            yield Document(doc_id=7, text="some text")  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="the source Odd yielded int 7 as doc_id of document 1; wanted: "):
        prepare_small(tmp_path / "out", source=Odd("*"))


@pytest.fixture
def templated_corpus(tmp_path: Path) -> JsonlSource:
    """A log in which every line fills in the same template, with one exact duplicate."""
    lines = [
        f"2026-11-30 worker {number} of the pool took the next job from the queue "
        "and finished it without any error"
        for number in range(9)
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in [*lines, lines[0]]))
    return JsonlSource(str(path), template="{text}")


def test_templated_text_needs_another_span(
    templated_corpus: JsonlSource, prepare_small: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ValueError,
        match=r"--heldout_documents 4: the corpus has only 1 components .*--dedup_span, which is 13.*null",
    ):
        prepare_small(tmp_path / "one", source=templated_corpus)
    folder = prepare_small(tmp_path / "null", source=templated_corpus, dedup_span=None)
    said = capsys.readouterr().out
    assert (
        "9 documents in 9 components of one document each (--dedup_span null); "
        "using 5 for training and 4 held out" in said
    )
    assert "0 documents in both splits (--dedup_span null" in said
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["settings"]["dedup_span"], manifest["shared_spans_between_splits"]) == (None, 0)
    assert (manifest["corpus"]["exact_duplicates"], manifest["corpus"]["components"]) == (1, 9)
    assert not items(folder).keys() & items(folder, "heldout").keys()
    with pytest.raises(ValueError, match=r"made with other settings \(dedup_span None instead of 13\)"):
        prepare_small(folder, source=templated_corpus)


def test_the_span_is_what_is_compared_and_counted(
    prepare_small: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The near duplicates aside, documents are unrelated words, but some share two consecutive tokens."""
    folder = prepare_small(tmp_path / "long", dedup_span=60)
    assert "0 spans of 60 tokens (--dedup_span) in both splits" in capsys.readouterr().out
    assert json.loads((folder / "manifest.json").read_text())["settings"]["dedup_span"] == 60
    with pytest.raises(
        ValueError, match=r"--heldout_documents 4: .*share no 2 tokens in a row.*--dedup_span, which is 2"
    ):
        prepare_small(tmp_path / "short", dedup_span=2)


@pytest.mark.parametrize("span", [0, -13, 1, True, 2.5])
def test_a_span_that_is_none(span: object, prepare_small: Prepare, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--dedup_span {span}: must be at least 2 tokens, or null"):
        prepare_small(tmp_path / "out", dedup_span=span)


def test_a_span_that_is_longer_than_every_document(prepare_small: Prepare, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--dedup_span 41: no document is that long \(the longest has 40 tokens\).*null"
    ):
        prepare_small(tmp_path / "out", dedup_span=41, max_tokens_per_document=40)


def test_a_folder_of_before_the_span_could_be_set_counts_as_13(
    prepared_dir: Path, prepare_small: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(prepared_dir, tmp_path / "old")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["settings"].pop("dedup_span") == 13
    (folder / "manifest.json").write_text(json.dumps(manifest))
    # A run on one of the folders can resume on the other.
    assert TaskFolder(folder, "train").layout == TaskFolder(prepared_dir, "train").layout
    prepare_small(folder)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"\(dedup_span 13 instead of None\)"):
        prepare_small(folder, dedup_span=None)


@pytest.mark.long
def test_two_processes_give_the_same_folder(
    prepared_dir: Path, prepare_small: Prepare, tmp_path: Path
) -> None:
    assert stored(prepare_small(tmp_path / "two", devices=2)) == stored(prepared_dir)


def test_the_same_command_again_says_that_it_is_there(
    prepare_small: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare_small(tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    prepare_small(folder, batch_tokens=64)  # affects only the speed
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(
        ValueError,
        match=r"--output_dir .*again: a task folder made with other settings "
        r"\(min_context 8 instead of 9\).*remove it",
    ):
        prepare_small(folder, min_context=9)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "else").mkdir()
    with pytest.raises(ValueError, match=r"--output_dir .*else: exists and is not a task folder"):
        prepare_small(tmp_path / "else")


def test_a_finished_folder_of_other_weights_or_text_is_not_accepted(
    prepare_small: Prepare, corpus_path: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    proxy, corpus = tmp_path / "proxy", tmp_path / "corpus.jsonl"
    shutil.copytree(tiny_model_dir, proxy)
    shutil.copy(corpus_path, corpus)
    settings = {"source": JsonlSource(str(corpus), template="{problem}"), "proxy": str(proxy)}
    folder = prepare_small(tmp_path / "tasks", **settings)
    for path in proxy.iterdir():
        os.utime(path, (1, 1))  # a copy of the same weights counts as the same proxy
    prepare_small(folder, **settings)
    weights = (proxy / "model.safetensors").read_bytes()
    (proxy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(
        ValueError,
        match=r"--output_dir .*tasks: a task folder made with different weights of --proxy '.*proxy'",
    ):
        prepare_small(folder, **settings)
    (proxy / "model.safetensors").write_bytes(weights)
    corpus.write_text(corpus.read_text().replace('"}', '"} ', 1).replace("a", "b", 1))
    with pytest.raises(
        ValueError, match=r"--output_dir .*tasks: a task folder made with different text of --source"
    ):
        prepare_small(folder, **settings)


def test_documents_that_the_tokenizer_cannot_express_are_counted(
    prepare_small: Prepare,
    corpus_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus, benchmark = tmp_path / "corpus.jsonl", tmp_path / "benchmark.jsonl"
    bad = json.dumps({"problem": "a lone surrogate \ud800 " + "and more words than the minimum " * 5})
    corpus.write_text(corpus_path.read_text() + bad + "\n")
    benchmark.write_text(bad + "\n")
    folder = prepare_small(
        tmp_path / "tasks",
        source=JsonlSource(str(corpus), template="{problem}"),
        benchmark_files=[str(benchmark)],
    )
    counts = json.loads((folder / "manifest.json").read_text())["corpus"]
    assert (
        counts["documents_read"],
        counts["too_short"],
        counts["inexpressible"],
        counts["inexpressible_benchmark_texts"],
    ) == (21, 1, 1, 1)
    said = capsys.readouterr().out
    assert "left out 1 documents of at most --min_context 8 tokens" in said
    assert "left out 1 documents with characters that the tokenizer has no tokens for" in said
    assert "left out 1 benchmark texts" in said
    corpus.write_text(bad + "\n")
    with pytest.raises(
        ValueError, match=r"--tokenizer: it has no tokens for some character of each of the 1 documents"
    ):
        prepare_small(tmp_path / "other", source=JsonlSource(str(corpus), template="{problem}"))


def test_bad_input(prepare_small: Prepare, tiny_model_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"--source: the corpus is empty .*empty\.jsonl"):
        prepare_small(output, source=JsonlSource(str(tmp_path / "empty.jsonl")))
    (tmp_path / "short.txt").write_text("two words")
    with pytest.raises(ValueError, match="--min_context 100: none of the 1 documents is longer"):
        prepare_small(output, source=TextFilesSource(str(tmp_path / "short.txt")), min_context=100)
    with pytest.raises(ValueError, match="--heldout_documents 17: the corpus has only 17 components"):
        prepare_small(output, heldout_documents=17)
    with pytest.raises(ValueError, match=r"--tokenizer '.*nowhere': no tokenizer could be loaded"):
        prepare_small(output, tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="--min_context 0: must be at least 1"):
        prepare_small(output, min_context=0)
    with pytest.raises(ValueError, match="--max_documents 4: must exceed --heldout_documents 4"):
        prepare_small(output, max_documents=4)
    with pytest.raises(ValueError, match="--window 4096: the proxy reads at most 1024"):
        prepare_small(output, window=4096)
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(
        ValueError,
        match=r"--proxy '.*other' \(\d+ tokens\) has a different tokenizer from --tokenizer '.*tiny'",
    ):
        prepare_small(output, proxy=str(other))
    with pytest.raises(ValueError, match=r"--proxy '.*other' predicts 512 tokens, but --tokenizer"):
        prepare_small(output, proxy=str(other), tokenizer=str(other))
    assert not output.exists()


@pytest.mark.parametrize(
    "config",
    sorted((Path(__file__).parents[2] / "configs/prepare").glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_every_config_is_understood(config: Path) -> None:
    from jsonargparse import ArgumentParser

    lines = config.read_text().splitlines()
    header = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert f"#   rpt prepare --config configs/prepare/{config.name}" in header
    assert any(line.startswith("# Hardware: ") for line in header)
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(prepare_function, as_positional=False)
    settings = parser.instantiate_classes(parser.parse_args(["--config", str(config)]))
    assert isinstance(settings.source, CorpusSource)
    assert settings.output_dir == f"tasks/{config.stem}"
