from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from folder_contents import items
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig

from rpt_lightning.data.modules.text import TextDataModule
from rpt_lightning.data.modules.trace_writer import TraceWriter
from rpt_lightning.data.modules.traces import TraceDataModule
from rpt_lightning.data.store.shards import folder_checksums, write_split
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.box import extract_prediction
from rpt_lightning.objectives.prompts.template import ChatPrompt, ContinuationPrompt
from rpt_lightning.pretrained.token_bytes import TokenBytes

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def token_bytes(tiny_tokenizer) -> TokenBytes:
    return TokenBytes(tiny_tokenizer)


def writer(tiny_tokenizer, token_bytes: TokenBytes, **settings: Any) -> TraceWriter:
    defaults = {"num_candidates": 3, "only_answerable": True, "seed": 0}
    return TraceWriter(ContinuationPrompt().bind(tiny_tokenizer), token_bytes, **(defaults | settings))


def id_of(token_bytes: TokenBytes, text: str) -> int:
    (token,) = token_bytes.encode_plain(text)
    return token


def test_a_trace_names_the_candidates_and_answers_with_one(tiny_tokenizer, token_bytes: TokenBytes) -> None:
    a, b, c, d = (id_of(token_bytes, letter) for letter in "abcd")
    trace = writer(tiny_tokenizer, token_bytes).write("doc:1", (a, b), (a, b, c, d), (0.5, 0.3, 0.1, 0.1))
    assert trace is not None
    assert token_bytes.join(trace.prompt_ids) == b"ab<think>"
    text = token_bytes.join(trace.target_ids)
    end = token_bytes[tiny_tokenizer.eos_token_id]
    assert text in [b"a|b|c</think>\\boxed{" + answer + b"}" + end for answer in (b"a", b"b", b"c")]
    assert trace.target_ids[-1] == tiny_tokenizer.eos_token_id


def test_answers_are_drawn_by_their_probability(tiny_tokenizer, token_bytes: TokenBytes) -> None:
    a, b, c = (id_of(token_bytes, letter) for letter in "abc")
    make = writer(tiny_tokenizer, token_bytes)
    counts: Counter[bytes | None] = Counter()
    for index in range(3000):
        trace = make.write(f"doc:{index}", (a,), (a, b, c), (0.4, 0.3, 0.1))
        assert trace is not None
        counts[extract_prediction(token_bytes.join(trace.target_ids))] += 1
    shares = [counts[letter] / 3000 for letter in (b"a", b"b", b"c")]
    assert shares == pytest.approx([0.5, 0.375, 0.125], abs=0.03)  # three standard deviations
    again = [make.write(f"doc:{index}", (a,), (a, b, c), (0.4, 0.3, 0.1)) for index in range(20)]
    assert again == [make.write(f"doc:{index}", (a,), (a, b, c), (0.4, 0.3, 0.1)) for index in range(20)]
    other = writer(tiny_tokenizer, token_bytes, seed=1)
    assert again != [other.write(f"doc:{index}", (a,), (a, b, c), (0.4, 0.3, 0.1)) for index in range(20)]


def test_candidates_that_cannot_be_boxed_are_left_out(tiny_tokenizer, token_bytes: TokenBytes) -> None:
    brace, a, b = (id_of(token_bytes, letter) for letter in "{ab")
    eos = tiny_tokenizer.eos_token_id
    trace = writer(tiny_tokenizer, token_bytes).write("doc:1", (a,), (eos, brace, a, b), (0.5, 0.3, 0.1, 0.1))
    assert trace is not None
    assert token_bytes.join(trace.target_ids).startswith(b"a|b</think>")
    assert writer(tiny_tokenizer, token_bytes).write("doc:1", (a,), (eos, brace), (0.5, 0.5)) is None
    careless = writer(tiny_tokenizer, token_bytes, only_answerable=False).write(
        "doc:1", (a,), (brace, a), (0.9, 0.1)
    )
    assert careless is not None
    assert token_bytes.join(careless.target_ids).startswith(b"{|a</think>")


@pytest.mark.parametrize("only_answerable", [True, False])
def test_candidates_that_are_no_token_are_left_out(
    tiny_tokenizer, token_bytes: TokenBytes, only_answerable: bool
) -> None:
    """Folders that were prepared before scoring left such rows out hold them."""
    a, b, padding = id_of(token_bytes, "a"), id_of(token_bytes, "b"), len(tiny_tokenizer) + 5
    assert a in token_bytes
    assert padding not in token_bytes
    trace = writer(tiny_tokenizer, token_bytes, only_answerable=only_answerable).write(
        "doc:1", (a,), (padding, a, b), (0.5, 0.3, 0.2)
    )
    assert trace is not None
    assert token_bytes.join(trace.target_ids).startswith(b"a|b</think>")


def test_the_marker_of_the_prompt_is_what_cannot_be_boxed(tiny_tokenizer, token_bytes: TokenBytes) -> None:
    a, mark = id_of(token_bytes, "a"), id_of(token_bytes, ">")
    for prompt, expected in (
        (ContinuationPrompt(), b">|a</think>"),
        (ContinuationPrompt("<", ">"), b"a>\\boxed{a}"),
    ):
        write = TraceWriter(
            prompt.bind(tiny_tokenizer), token_bytes, num_candidates=3, only_answerable=True, seed=0
        ).write
        trace = write("doc:1", (a,), (mark, a), (0.5, 0.5))
        assert trace is not None
        assert token_bytes.join(trace.target_ids).startswith(expected)


def _store(folder: Path, items: list[Any]) -> Path:
    """Replace the split ``train`` and update the manifest."""
    shutil.rmtree(folder / "train")
    write_split(folder / "train", items, chunk_bytes="64MB")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["train"] = folder_checksums(folder / "train")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def permute_truths(folder: Path, target: Path) -> Path:
    """Copy the folder with other true tokens.

    From the first task of a document on, the tokens that are not context of any task are shuffled.
    """
    shutil.copytree(folder, target)
    reader = TaskFolder(folder, "train")
    rng = np.random.default_rng(0)
    items = [dict(reader.document(index)) for index in range(len(reader))]
    for item in items:
        item["true_prob"] = rng.random(len(item["true_prob"]), dtype=np.float32)
        item["true_rank"] = rng.integers(0, 500, len(item["true_rank"])).astype(np.int32)
        last = item["positions"].max()
        item["token_ids"] = np.concatenate(
            [item["token_ids"][:last], rng.integers(40, 500, len(item["token_ids"]) - last).astype(np.int32)]
        )
    return _store(target, items)


def last_positions_only(folder: Path, target: Path) -> Path:
    """Keep one task per document, its last.

    No true token is then context of another task, so all of them can be exchanged.
    """
    shutil.copytree(folder, target)
    reader = TaskFolder(folder, "train")
    items = []
    for index in range(len(reader)):
        item = reader.document(index)
        columns = (
            "positions",
            "entropy",
            "true_prob",
            "true_rank",
            "answerable",
            "candidate_ids",
            "candidate_probs",
        )
        middle = len(item["positions"]) // 2
        items.append(dict(item) | {name: item[name][middle : middle + 1] for name in columns})
    return _store(target, items)


def traces_of(folder: Path, **settings: Any) -> list[Any]:
    module = TraceDataModule(
        str(folder),
        ContinuationPrompt(),
        **({"traces_per_step": 14, "positions_per_document": 20} | settings),
    )
    module.setup("fit")
    return list(next(iter(module.train_dataloader())).sequences)


def test_traces_never_see_the_truth(prepared_dir: Path, tmp_path: Path) -> None:
    """Other true tokens, probabilities and ranks give the same traces if candidates and contexts stay."""
    original = last_positions_only(prepared_dir, tmp_path / "original")
    permuted = permute_truths(original, tmp_path / "permuted")
    left, right = TaskFolder(original, "train"), TaskFolder(permuted, "train")
    truths = [
        (left.task(index, 0).continuation_ids, right.task(index, 0).continuation_ids)
        for index in range(len(left))
    ]
    assert sum(ours != theirs for ours, theirs in truths) == len(truths) == 14
    assert len(traces_of(original)) == 14
    assert traces_of(original) == traces_of(permuted)


def test_traces_of_a_real_folder_parse(prepared_dir: Path) -> None:
    folder = TaskFolder(prepared_dir, "train")
    for trace in traces_of(prepared_dir, traces_per_step=60):
        completion = folder.token_bytes.join(trace.target_ids)
        thought, _ = completion.split(b"</think>")
        answer = extract_prediction(completion)
        assert answer
        assert answer in thought
        assert trace.prompt_ids[
            -len(folder.token_bytes.encode_plain("<think>")) :
        ] == folder.token_bytes.encode_plain("<think>")


def test_a_padded_vocabulary_changes_neither_scores_nor_traces(
    prepare_small: Callable[..., Path],
    prepared_dir: Path,
    tiny_model_dir: Path,
    tiny_tokenizer,
    tmp_path: Path,
) -> None:
    """The rows after the last token, as in Qwen's models, are often more likely here than any token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    num_tokens = len(tiny_tokenizer)
    model.resize_token_embeddings(num_tokens + 64, mean_resizing=False)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[num_tokens:] = 3 * rows[:64]
        likely = model(input_ids=torch.arange(100, 130)[None]).logits[0].topk(16).indices
    assert (likely >= num_tokens).any()
    proxy = tmp_path / "padded"
    model.save_pretrained(proxy)
    tiny_tokenizer.save_pretrained(proxy)
    folder = prepare_small(tmp_path / "tasks", proxy=str(proxy))
    padded, plain = items(folder), items(prepared_dir)
    assert padded.keys() == plain.keys()
    for doc_id, item in padded.items():
        assert item["candidate_ids"].max() < num_tokens
        np.testing.assert_array_equal(item["positions"], plain[doc_id]["positions"])
        for name in ("entropy", "true_prob", "candidate_probs"):
            np.testing.assert_allclose(item[name], plain[doc_id][name], rtol=1e-4)
    assert len(traces_of(folder)) == 14


def test_traces_in_a_chat(prepared_dir: Path, tiny_tokenizer) -> None:
    module = TraceDataModule(str(prepared_dir), ChatPrompt("v0"), traces_per_step=1)
    module.setup("fit")
    (trace,) = next(iter(module.train_dataloader())).sequences
    assert trace.target_ids[-1] in ChatPrompt("v0").bind(tiny_tokenizer).stop_token_ids


def test_another_models_predictions_are_refused(prepared_dir: Path, tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.policy = type("Policy", (), {"path": path})()

    def setup(path: str, **settings: Any) -> None:
        module = TraceDataModule(str(prepared_dir), ContinuationPrompt(), **settings)
        module.trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        module.trainer.strategy._lightning_module = Module(path)
        module.setup("fit")

    proxy = json.loads((prepared_dir / "manifest.json").read_text())["proxy"]
    setup(proxy)
    setup(proxy + "/")
    setup("models/another", allow_other_proxy=True)
    with pytest.raises(
        ValueError,
        match=r"scored by '.*tiny', but the model being trained is 'models/another'"
        r".*--data.allow_other_proxy true",
    ):
        setup("models/another")


def test_whole_documents_for_next_token_training(write_task_folder: Write, tmp_path: Path) -> None:
    module = TextDataModule(str(write_task_folder(tmp_path / "t", [5, 1, 4])), documents_per_step=2)
    module.setup("fit")
    batches = iter(module.train_dataloader())
    sequences = [sequence for _ in range(3) for sequence in next(batches).sequences]
    # Two epochs of the three documents.
    assert sorted(sequence.num_tokens for sequence in sequences) == [2, 2, 5, 5, 6, 6]
    assert all(sequence.prompt_ids == (40,) and sequence.target_ids[0] == 41 for sequence in sequences)
    assert len(module.train_dataloader()) == 1


def test_text_begins_as_the_tokenizer_begins_it_and_is_cut(
    write_task_folder: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = write_task_folder(tmp_path / "t", [9, 2])
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    for max_tokens, longest in ((None, 10), (6, 5)):
        module = TextDataModule(str(folder), documents_per_step=2, max_tokens=max_tokens)
        module.setup("fit")
        sequences = module.make_batch([(0, 0), (1, 0)]).sequences
        assert [sequence.prompt_ids for sequence in sequences] == [(bos,), (bos,)]
        assert [sequence.target_ids for sequence in sequences] == [
            tuple(range(40, 40 + longest)),
            (40, 41, 42),
        ]
    with pytest.raises(ValueError, match=r"--data.max_tokens 1: must be at least 2"):
        TextDataModule(str(folder), max_tokens=1)


def test_text_is_cut_to_the_positions_of_the_model(
    write_task_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module = TextDataModule(str(write_task_folder(tmp_path / "t", [9, 2])), documents_per_step=2)
    module.setup("fit")
    policy = SimpleNamespace(config=LlamaConfig(max_position_embeddings=4))
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(policy=policy)
    )
    assert [sequence.num_tokens for sequence in module.make_batch([(0, 0), (1, 0)]).sequences] == [4, 3]
