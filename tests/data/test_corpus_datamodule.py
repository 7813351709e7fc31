from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from rpt_lightning.data.modules.corpus import CorpusDataModule
from rpt_lightning.data.modules.worked_examples import Phase
from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Document, Mark


class Numbers(CorpusSource):
    def __init__(self, count: int = 7) -> None:
        self.count = count

    def documents(self) -> Iterator[Document]:
        for number in range(self.count):
            text = f"{number} and one more is {number + 1}."
            mark = Mark(
                start=len(text) - 3, end=len(text) - 1, fields={"depth": number}, thought=f" {number} +"
            )
            yield Document(doc_id=f"n{number}", text=text, marks=(mark,))

    def describe(self) -> dict[str, Any]:
        return {"kind": "numbers", "count": self.count}


def attached(data: CorpusDataModule, tokenizer, *, rank: int = 0, num_ranks: int = 1) -> CorpusDataModule:
    strategy = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": num_ranks})
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(tokenizer=tokenizer),
        strategy=strategy,
        state=SimpleNamespace(fn="fit"),
    )
    data.setup("fit")
    return data


def texts(batch: dict[str, Any], tokenizer) -> list[bytes]:
    token_bytes = TokenBytes(tokenizer)
    return [
        token_bytes.join(sequence.prompt_ids) + b"|" + token_bytes.join(sequence.target_ids)
        for sequence in batch.sequences
    ]


def make(tokenizer, **settings: Any) -> CorpusDataModule:
    settings = {"source": Numbers(), "documents_per_step": 3, "prompt": ContinuationPrompt()} | settings
    return attached(CorpusDataModule(**settings), tokenizer)


def test_plain_text_needs_neither_marks_nor_a_task_folder(tiny_tokenizer) -> None:
    data = make(tiny_tokenizer, prompt=None, documents_per_step=7)
    wanted = {f"{number} and one more is {number + 1}." for number in range(7)}
    assert {
        text.replace(b"|", b"", 1).decode() for text in texts(data.next_batch(), tiny_tokenizer)
    } == wanted
    assert len(data.val_dataloader()) == 0


def test_each_document_comes_with_its_worked_example(tiny_tokenizer) -> None:
    data = make(tiny_tokenizer, documents_per_step=1)
    document, example = texts(data.next_batch(), tiny_tokenizer)
    assert document.replace(b"|", b"", 1).endswith(b".")
    number = int(document[:1])
    assert example.startswith(
        f"{number} and one more is<think>| {number} +</think>\\boxed{{ {number + 1}}}".encode()
    )


def test_phases_go_by_step_and_a_resumed_run_is_in_the_same_one(tiny_tokenizer) -> None:
    settings = {"phases": [Phase(steps=2, text=False), Phase(p_cot=0.0)]}
    whole = make(tiny_tokenizer, **settings)
    batches = []
    for step in range(5):
        if step == 3:
            state = whole.state_dict()
        batches.append(texts(whole._next_batch(), tiny_tokenizer))
    assert [len(batch) for batch in batches] == [3, 3, 6, 6, 6]
    assert all(b"+</think>" in text for batch in batches[:2] for text in batch)
    assert not any(b"+</think>" in text for batch in batches[2:] for text in batch)
    resumed = make(tiny_tokenizer, **settings)
    resumed.load_state_dict(state)
    assert [texts(resumed._next_batch(), tiny_tokenizer) for _ in range(2)] == batches[3:]


def test_ranks_share_a_step(tiny_tokenizer) -> None:
    settings = {
        "source": Numbers(),
        "documents_per_step": 4,
        "prompt": ContinuationPrompt(),
        "phases": [Phase(p_cot=0.5)],
    }
    alone = texts(make(tiny_tokenizer, **settings).next_batch(), tiny_tokenizer)
    parts = [
        texts(
            attached(CorpusDataModule(**settings), tiny_tokenizer, rank=rank, num_ranks=2).next_batch(),
            tiny_tokenizer,
        )
        for rank in range(2)
    ]
    assert parts[0] + parts[1] == alone


def test_another_corpus_is_no_place_to_go_on_in(tiny_tokenizer) -> None:
    state = make(tiny_tokenizer).state_dict()
    with pytest.raises(ValueError, match="number of documents 7, and this run has 6"):
        make(tiny_tokenizer, source=Numbers(6)).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompt": None, "phases": [Phase()]}, "--data.prompt is null"),
        ({"phases": []}, r"--data.phases \[\]"),
        ({"max_tokens": 1}, "--data.max_tokens 1"),
        ({"source": Numbers(0)}, "--data.source: the corpus is empty"),
        ({"documents_per_step": 8}, "--data.documents_per_step 8"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny_tokenizer, settings, says) -> None:
    with pytest.raises(ValueError, match=says):
        make(tiny_tokenizer, **settings)


def test_worked_examples_need_thoughts(tiny_tokenizer) -> None:
    class Plain(Numbers):
        def documents(self) -> Iterator[Document]:
            return (Document(doc_id=document.doc_id, text=document.text) for document in super().documents())

    with pytest.raises(
        ValueError,
        match=r"--data.prompt: worked examples need marks with thoughts, and no document of Plain has one",
    ):
        make(tiny_tokenizer, source=Plain())


@pytest.mark.parametrize(
    ("yielded", "named"),
    [
        ("just text", "the source Own yielded str 'just text' as document 2; wanted: "),
        (
            Document(doc_id="d", text=b"bytes"),
            "the source Own yielded bytes b'bytes' as text of document 2; wanted: ",
        ),  # type: ignore[arg-type]
        (
            Document(doc_id="d", text="abc", marks=(Mark(start=1, end=9),)),
            r"document 'd', mark 0 \(characters 1 to 9\): is empty, or not inside",
        ),
    ],
)
def test_what_a_source_must_not_yield(tiny_tokenizer, yielded: Any, named: str) -> None:
    class Own(Numbers):
        def documents(self) -> Iterator[Document]:
            yield Document(doc_id="first", text="is one")
            yield yielded

    with pytest.raises(ValueError, match=named):
        make(tiny_tokenizer, source=Own(), prompt=None)


def test_held_out_positions_of_another_tokenizer_are_refused(tiny_tokenizer, tiny_task_dir) -> None:
    """To this model the ids would mean other words, so the accuracy would be meaningless."""
    data = make(tiny_tokenizer, task_dir=str(tiny_task_dir), eval_min_entropy=0.1)
    assert len(data.val_dataloader()) > 0
    data.trainer.lightning_module.tokenizer_hash = "2:another"
    with pytest.raises(
        ValueError,
        match=r"--data.task_dir .*: prepared with the tokenizer of .*, "
        r"which is not that of the model being trained",
    ):
        data.setup("fit")


def test_text_is_cut_to_the_positions_of_the_model(tiny_tokenizer) -> None:
    """As in `TextDataModule`, a model must not be trained on text beyond the positions that it can read."""
    data = make(tiny_tokenizer, prompt=None)
    data.trainer.lightning_module.policy = SimpleNamespace(config=LlamaConfig(max_position_embeddings=4))
    assert [sequence.num_tokens for sequence in data.next_batch().sequences] == [4, 4, 4]
    data.max_tokens = 3
    assert [sequence.num_tokens for sequence in data.next_batch().sequences] == [3, 3, 3]
