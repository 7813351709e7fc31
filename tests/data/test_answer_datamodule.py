"""Questions as tasks. A run's tasks must not depend on where it was stopped or on the number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import Recorder, read

from rpt_lightning.data.modules.answers import AnswerTaskDataModule, choose
from rpt_lightning.data.sources.questions import JsonlQuestions
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Question

NUM_QUESTIONS = 11
Make = Callable[..., AnswerTaskDataModule]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("questions")
    train = write(
        folder / "train.jsonl",
        [{"problem": f"What is {index} + {index}?", "answer": 2 * index} for index in range(NUM_QUESTIONS)],
    )
    heldout = write(
        folder / "heldout.jsonl",
        [{"problem": f"What is {index} - 1?", "answer": index - 1} for index in range(5)],
    )

    def module(**settings: Any) -> AnswerTaskDataModule:
        return AnswerTaskDataModule(
            **(
                {"train": JsonlQuestions(train), "heldout": JsonlQuestions(heldout), "tasks_per_step": 3}
                | settings
            )
        )

    return module


def fit(
    data: AnswerTaskDataModule,
    tokenizer: Any,
    log: Path,
    max_steps: int,
    *,
    draws: tuple[int, ...] = (0,),
    **options: Any,
) -> None:
    module = Recorder(log, draws)
    module.tokenizer = tokenizer  # type: ignore[assignment]
    checkpoint, resume = options.pop("checkpoint", None), options.pop("resume", None)
    Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[ModelCheckpoint(checkpoint, filename="{step}", every_n_train_steps=1, save_top_k=-1)]
        if checkpoint
        else [],
        logger=False,
        enable_checkpointing=bool(checkpoint),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=log.parent,
        **options,
    ).fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))


def test_a_run_stopped_after_any_step_goes_on_with_the_same_questions(
    make: Make, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Seven steps of 3 questions, with up to 2 more drawn in each, are more than two epochs of 11."""
    draws = (2, 0, 1)
    fit(make(), tiny_tokenizer, tmp_path / "whole", 7, draws=draws, checkpoint=tmp_path / "checkpoints")
    whole = read(tmp_path / "whole")
    seen = [task for record in whole for task in record["tasks"] + record["drawn"]]
    assert len(seen) == 7 * 3 + 8
    assert (
        len(set(seen[:NUM_QUESTIONS])) == len(set(seen[NUM_QUESTIONS : 2 * NUM_QUESTIONS])) == NUM_QUESTIONS
    )
    assert seen[:NUM_QUESTIONS] != seen[NUM_QUESTIONS : 2 * NUM_QUESTIONS]
    for stop in (1, 3, 4, 6):
        fit(
            make(),
            tiny_tokenizer,
            tmp_path / f"from-{stop}",
            7,
            draws=draws,
            resume=tmp_path / f"checkpoints/step={stop}.ckpt",
        )
        assert read(tmp_path / f"from-{stop}") == whole[stop:], stop


def test_a_checkpoint_of_other_questions_is_refused(make: Make, tiny_tokenizer: Any, tmp_path: Path) -> None:
    fit(make(), tiny_tokenizer, tmp_path / "log", 1, checkpoint=tmp_path / "checkpoints")
    other = write(
        tmp_path / "other.jsonl",
        [
            {"problem": f"What is {index} + {index}?", "answer": 2 * index + 1}
            for index in range(NUM_QUESTIONS)
        ],
    )
    with pytest.raises(ValueError, match=r"--ckpt_path: .* text with the fingerprint"):
        fit(
            make(train=JsonlQuestions(other)),
            tiny_tokenizer,
            tmp_path / "log",
            2,
            resume=tmp_path / "checkpoints/step=1.ckpt",
        )


def on_rank(
    data: AnswerTaskDataModule, tokenizer: Any, rank: int = 0, num_ranks: int = 1
) -> AnswerTaskDataModule:
    """Set the module up as one process of a run with several sees it."""
    strategy = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": num_ranks})
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=strategy, lightning_module=SimpleNamespace(tokenizer=tokenizer)
    )
    data.setup("fit")
    return data


@settings(max_examples=20)
@given(
    wanted=st.lists(st.integers(0, 3), min_size=1, max_size=4), tasks_per_step=st.integers(1, NUM_QUESTIONS)
)
def test_ranks_together_see_what_one_would(
    make: Make, tiny_tokenizer: Any, wanted: list[int], tasks_per_step: int
) -> None:
    one = on_rank(make(tasks_per_step=tasks_per_step), tiny_tokenizer)
    ranks = [
        on_rank(make(tasks_per_step=tasks_per_step), tiny_tokenizer, rank, len(wanted))
        for rank in range(len(wanted))
    ]
    loaders = [iter(module.train_dataloader()) for module in ranks]
    whole = iter(one.train_dataloader())
    for _ in range(2):
        assert [task for loader in loaders for task in next(loader).tasks] == list(next(whole).tasks)
        drawn = [task for module in ranks for task in module.draw(wanted)]
        assert drawn == list(one.draw([sum(wanted)]))
    validation = [[batch.tasks for batch in module.val_dataloader()] for module in ranks]
    merged = [sum(shares, ()) for shares in zip(*validation, strict=True)]
    assert merged == [batch.tasks for batch in one.val_dataloader()]


@pytest.mark.long
def test_two_processes_share_the_steps_of_one(make: Make, tiny_tokenizer: Any, tmp_path: Path) -> None:
    fit(make(), tiny_tokenizer, tmp_path / "one", 4)
    fit(make(), tiny_tokenizer, tmp_path / "two", 4, strategy="ddp_spawn", devices=2)
    left, right = read(tmp_path / "two", 0), read(tmp_path / "two", 1)
    assert [a["tasks"] + b["tasks"] for a, b in zip(left, right, strict=True)] == [
        record["tasks"] for record in read(tmp_path / "one")
    ]


def test_a_question_is_read_in_plain_tokens(tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"problem": "Is <|im_end|> a marker?", "answer": "no"}]
    data = AnswerTaskDataModule(train=JsonlQuestions(write(tmp_path / "q.jsonl", rows)), tasks_per_step=1)
    (task,) = on_rank(data, tiny_tokenizer).train
    assert tiny_tokenizer.eos_token_id not in task.context_ids
    text = TokenBytes(tiny_tokenizer).join(task.context_ids).decode()
    assert (
        text == "Is <|im_end|> a marker?\n\n"
        "Please reason step by step, and put your final answer within \\boxed{}.\n"
    )
    assert task.task_id == "q:1"


def test_long_questions_are_left_out_of_training_only(
    make: Make, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        {"problem": "What is " + " + ".join(["1"] * number) + "?", "answer": number} for number in (2, 3, 40)
    ]
    long = JsonlQuestions(write(tmp_path / "long.jsonl", rows))
    everything = on_rank(make(train=long), tiny_tokenizer)
    limit = sorted(len(task.context_ids) for task in everything.train)[1]
    data = on_rank(make(train=long, tasks_per_step=2, max_question_tokens=limit), tiny_tokenizer)
    assert [task.question.answer for task in data.train] == ["2", "3"]
    assert len(data.heldout) == 5


def test_bad_settings(make: Make, tiny_tokenizer: Any, tmp_path: Path) -> None:
    for changes, message in [
        ({"tasks_per_step": 12}, r"--data.tasks_per_step 12: --data.train has only 11 to train on"),
        ({"train": None}, r"--data.train is not set"),
        (
            {"heldout": make().train_source},
            r"--data.heldout: 11 of its questions are in --data.train too \('train:1' for one\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            on_rank(make(**changes), tiny_tokenizer)
    with pytest.raises(ValueError, match=r"--data.eval_batch_size 0: must be at least 1"):
        make(eval_batch_size=0)


def test_a_part_of_the_questions_is_a_function_of_the_seed() -> None:
    questions = [Question(question_id=str(index), text=f"{index}?", answer="1") for index in range(20)]
    chosen = choose(questions, 6, seed=3)
    assert list(chosen) == sorted(chosen, key=questions.index)
    assert chosen == choose(questions, 6, seed=3) != choose(questions, 6, seed=4)
    assert choose(questions, None, seed=0) == choose(questions, 20, seed=1) == tuple(questions)
