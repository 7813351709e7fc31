from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small_run import SCRIPT

from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
from rpt_lightning.data.prepare.prepare_command import prepare
from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.records.own_traces import OwnTraces
from rpt_lightning.records.rollout_samples import RolloutSample, read_samples, write_samples
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.training.callbacks.logs import RolloutSamples
from rpt_lightning.types import Document


@pytest.fixture(scope="module")
def folder(tiny_task_dir):
    return TaskFolder(tiny_task_dir, "train")


def sample(task, thought, prediction, **more):
    text = f"{thought}</think>\\boxed{{{prediction}}}"
    own = RolloutSample(
        task_id=task.task_id,
        context="shown to people only",
        truth=tuple(map(bytes.decode, task.continuation)),
        thought=f"{thought}</think>",
        completion=text,
        prediction=prediction,
        reward=0.5,
        finish_reason="stop",
        policy_version=0,
    )
    return replace(own, **more)


def ascii_task(folder, number):
    """A task of another document for each number. Its context and continuation are whole characters."""
    return next(
        task
        for task in (folder.task(number, k) for k in range(int(folder.num_positions[number]) - 1, -1, -1))
        if b"".join(task.continuation).isascii()
    )


def write(run, steps, task_dir=None):
    for step, samples in steps.items():
        write_samples(samples, run / "rollouts" / f"step-{step:06d}.jsonl")
    if task_dir is not None:
        config = {"data": {"class_path": "TokenTaskDataModule", "init_args": {"task_dir": str(task_dir)}}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    return str(run)


def traces(source):
    return [document for document in source.documents() if document.split == "train"]


def test_right_completions_become_text_and_held_out_documents_stay(folder, tiny_task_dir, tmp_path):
    tasks = [ascii_task(folder, number) for number in range(3)]
    right = [task.continuation[0].decode() for task in tasks]
    two = b"".join(tasks[1].continuation[:2]).decode()
    samples = [
        sample(tasks[0], "so it is", right[0]),
        sample(tasks[0], "no", "never this"),
        sample(tasks[1], "two tokens", two),
        sample(tasks[2], "no box", None),
    ]
    run = write(tmp_path / "run", {3: samples}, tiny_task_dir)
    documents = list(OwnTraces(run).documents())
    heldout = TaskFolder(tiny_task_dir, "heldout")
    assert [document.doc_id for document in documents if document.split == "heldout"] == [
        heldout.document(index)["doc_id"] for index in range(len(heldout))
    ]
    assert documents[0].text.encode() == heldout.token_bytes.join(heldout.token_ids(0))
    first, second = traces(OwnTraces(run))
    context = folder.token_bytes.join(tasks[0].context_ids).decode()
    assert (first.doc_id, first.text) == (f"{tasks[0].task_id}@3", f"{context}so it is{right[0]}")
    assert [(first.text[mark.start : mark.end], mark.fields["part"]) for mark in first.marks] == [
        (context, "context"), ("so it is", "thought"), (right[0], "answer"),
    ]  # fmt: skip
    assert second.text.endswith(f"two tokens{two}")


def test_the_latest_different_completions_of_a_task_are_kept(folder, tiny_task_dir, tmp_path):
    task = ascii_task(folder, 0)
    right = task.continuation[0].decode()

    def rows(*thoughts):
        return [sample(task, thought, right) for thought in thoughts]

    run = write(tmp_path / "run", {1: rows("a", "b"), 2: rows("c", "c"), 11: rows("b")}, tiny_task_dir)

    def thoughts(number):
        source = OwnTraces(run, max_per_task=number, template="{thought}")
        return [(document.doc_id.rpartition("@")[2], document.text) for document in traces(source)]

    assert thoughts(1) == [("11", "b")]
    assert thoughts(2) == [("2", "c"), ("11", "b")]
    assert thoughts(5) == [("1", "a"), ("2", "c"), ("11", "b")]


def test_options_of_the_text(folder, tiny_task_dir, tmp_path):
    task = ascii_task(folder, 0)
    right = task.continuation[0].decode()
    run = write(tmp_path / "run", {1: [sample(task, "hm", right, reward=0.2)]}, tiny_task_dir)
    tail = folder.token_bytes.join(task.context_ids[-2:]).decode()
    source = OwnTraces(run, template="{context} # {thought} = {answer}!", context_tokens=2)
    (document,) = traces(source)
    assert document.text == f"{tail} # hm = {right}!"
    assert [document.text[mark.start : mark.end] for mark in document.marks] == [tail, "hm", right]
    (document,) = traces(OwnTraces(run, think_close=None, context_tokens=0))
    assert document.text == f"hm</think>{right}"
    assert len(traces(OwnTraces(run, min_reward=0.2))) == 1
    with pytest.raises(ValueError, match=r"none of the 1 completions in rollouts/ earned 0.3 or more"):
        traces(OwnTraces(run, min_reward=0.3))


def test_a_context_that_begins_inside_a_character():
    from rpt_lightning.records.own_traces import _without_first_part

    for text in ("é", "漢", "😀"):
        for cut in range(len(text.encode())):
            assert _without_first_part((text.encode() + b"ab")[cut:]).decode() == (
                f"{text}ab" if cut == 0 else "ab"
            )


# Bad input


def test_a_run_without_a_right_completion(folder, tiny_task_dir, tmp_path):
    run = write(tmp_path / "run", {1: [sample(ascii_task(folder, 0), "hm", "never this")] * 4}, tiny_task_dir)
    output = tmp_path / "tasks"
    with pytest.raises(
        ValueError, match=r"none of the 4 completions in rollouts/ is right, so there is nothing"
    ):
        make(OwnTraces(run), output, tiny_task_dir)
    assert not output.exists()
    assert not output.with_name("tasks.partial").exists()


def test_a_run_without_completions(tmp_path):
    with pytest.raises(ValueError, match=r"there are no completions in .*name a run of RPTModule"):
        list(OwnTraces(str(tmp_path)).documents())


def test_a_run_whose_task_folder_is_not_known(folder, tmp_path):
    run = write(tmp_path / "run", {1: [sample(ascii_task(folder, 0), "hm", "x")]})
    with pytest.raises(ValueError, match=r"task_dir is not set, and .*config.yaml does not name"):
        list(OwnTraces(run).documents())
    (tmp_path / "run" / "config.yaml").write_text("data: {class_path: AnswerTaskDataModule, init_args: {}}")
    with pytest.raises(ValueError, match=r"does not name the run's task folder .KeyError"):
        list(OwnTraces(run).documents())


def test_completions_about_held_out_or_other_documents(folder, tiny_task_dir, tmp_path):
    heldout = ascii_task(TaskFolder(tiny_task_dir, "heldout"), 0)
    run = write(tmp_path / "a", {1: [sample(heldout, "hm", heldout.continuation[0].decode())]}, tiny_task_dir)
    with pytest.raises(ValueError, match="this folder holds it out; give the folder that the run trained on"):
        list(OwnTraces(run).documents())
    other = replace(sample(heldout, "hm", heldout.continuation[0].decode()), task_id="elsewhere:7")
    run = write(tmp_path / "b", {1: [other]}, tiny_task_dir)
    with pytest.raises(ValueError, match="document 'elsewhere', but this folder does not have it"):
        list(OwnTraces(run).documents())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{context}{answer}"}, r"\{thought\} has to be among them"),
        ({"template": "{thought}{truth}"}, r"made of \{context\}, \{thought\}, \{answer\}"),
        ({"max_per_task": 0}, "max_per_task 0: give 1 or more"),
        ({"context_tokens": -1}, "context_tokens -1: give 0 or more"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        OwnTraces("runs/some", **options)


# Through `rpt prepare`


def make(source, output, tiny_task_dir, **more):
    tokenizer = str(Path(tiny_task_dir) / "tokenizer")
    proxy = json.loads((Path(tiny_task_dir) / "manifest.json").read_text())["proxy"]
    settings = {
        "entropy_threshold": 0.5, "min_context": 4, "window": 256, "overlap": 64, "precision": "32-true",
        "dedup_span": None, "heldout_documents": 1,
    }  # fmt: skip
    prepare(source, str(output), tokenizer=tokenizer, proxy=proxy, **(settings | more))
    return output


def test_from_a_run_to_tasks_to_a_run(make_run, tiny_task_dir, tmp_path):
    run = tmp_path / "run"
    trainer, module, data = make_run(6, run_dir=run, callbacks=[RolloutSamples(every_n_steps=1)])
    trainer.fit(module, data)
    rows = [row for path in sorted((run / "rollouts").glob("*")) for row in read_samples(path)]
    right = {row.task_id for row in rows if row.reward == 1.0}
    assert right
    output = make(OwnTraces(str(run), str(tiny_task_dir)), tmp_path / "recursion", tiny_task_dir)
    new, old = (
        {split: TaskFolder(path, split) for split in ("train", "heldout")} for path in (output, tiny_task_dir)
    )
    ids = {
        (name, split): {part.document(index)["doc_id"] for index in range(len(part))}
        for name, parts in (("new", new), ("old", old))
        for split, part in parts.items()
    }
    assert ids["new", "heldout"] == ids["old", "heldout"]
    assert {doc_id.rpartition("@")[0] for doc_id in ids["new", "train"]} == right
    origins = {doc_id.rpartition("@")[0].rpartition(":")[0] for doc_id in ids["new", "train"]}
    assert origins <= ids["old", "train"]
    assert not origins & ids["new", "heldout"]
    parts = {new["train"].task(0, k).fields["part"] for k in range(int(new["train"].num_positions[0]))}
    assert "thought" in parts
    # The same held-out positions as before, and those behind which a document was cut.
    positions = [
        {folder["heldout"].task(index, k).task_id for index in range(len(folder["heldout"]))
         for k in range(int(folder["heldout"].num_positions[index]))}
        for folder in (new, old)
    ]  # fmt: skip
    assert positions[0] >= positions[1]
    trainer, module, _ = make_run(1, engine=lambda: ScriptedEngine(SCRIPT), run_dir=tmp_path / "again")
    trainer.fit(module, TokenTaskDataModule(str(output), tasks_per_step=4))
    assert trainer.global_step == 1


class Given(CorpusSource):
    def __init__(self, *documents):
        self._documents = documents

    def documents(self):
        yield from self._documents

    def describe(self):
        return {"kind": "given"}


def text(number):
    return " ".join(f"word{number} says {index * number + 7} things" for index in range(12))


def test_text_that_a_held_out_document_has_too_is_left_out(tiny_task_dir, tmp_path):
    """The trace of a training document may repeat what a held-out document says."""
    documents = [
        Document(doc_id="held", text=text(1), split="heldout"),
        Document(doc_id="apart", text=text(5), split="train"),
        Document(doc_id="leaks", text=text(7) + text(1)[20:90] + text(9), split="train"),
    ]
    output = make(Given(*documents), tmp_path / "tasks", tiny_task_dir, dedup_span=13)
    assert TaskFolder(output, "train").document(0)["doc_id"] == "apart"
    assert (len(TaskFolder(output, "train")), len(TaskFolder(output, "heldout"))) == (1, 1)
    corpus = json.loads((output / "manifest.json").read_text())["corpus"]
    assert corpus["siblings_of_heldout_documents"] == 1
    with pytest.raises(ValueError, match=r"no training document is left, .* --dedup_span, which is 13"):
        make(Given(documents[0], documents[2]), tmp_path / "none", tiny_task_dir, dedup_span=13)


@pytest.mark.parametrize(
    ("splits", "more", "message"),
    [
        (("heldout", None), {}, "of 1 documents on which side .*and not of 1"),
        (("heldout", "heldout"), {}, "no train document is left"),
        (("train", "train"), {}, "no heldout document is left"),
        (("train", "test"), {}, "its split is 'test', but must be train, heldout or None"),
        (("train", "heldout", "heldout", "heldout"), {"max_documents": 3}, "exceed the 3 documents"),
    ],
)  # fmt: skip
def test_splits_that_cannot_be(splits, more, message, tiny_task_dir, tmp_path):
    documents = [
        Document(doc_id=str(number), text=text(number + 1), split=split)
        for number, split in enumerate(splits)
    ]
    with pytest.raises(ValueError, match=message):
        make(Given(*documents), tmp_path / "tasks", tiny_task_dir, **more)
    assert not (tmp_path / "tasks").exists()
