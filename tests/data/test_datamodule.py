"""With a real Trainer, a run's tasks must not depend on where it was stopped or on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from recorder import Recorder, read
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rpt_lightning.data.modules.stream import Place
from rpt_lightning.data.modules.text import TextDataModule
from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.pretrained.specification import earlier_tokenizer_hash, tokenizer_hash
from rpt_lightning.pretrained.token_bytes import TokenBytes

Write = Callable[..., Path]
NUM_POSITIONS = [5, 1, 4, 3, 6, 2, 5]  # 26 positions


def fit(
    folder: Path,
    log: Path,
    max_steps: int,
    *,
    draws: tuple[int, ...] = (0,),
    checkpoint: Path | None = None,
    resume: Path | None = None,
    val_every: int | None = None,
    data: dict[str, Any] | None = None,
    **trainer: Any,
) -> None:
    callbacks = (
        [ModelCheckpoint(checkpoint, filename="{step}", every_n_train_steps=1, save_top_k=-1)]
        if checkpoint
        else []
    )
    Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=callbacks,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=bool(checkpoint),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=log.parent,
        **(
            {"limit_val_batches": 0}
            if val_every is None
            else {"val_check_interval": val_every, "check_val_every_n_epoch": None}
        ),
        **trainer,
    ).fit(
        Recorder(log, draws),
        datamodule=TokenTaskDataModule(
            str(folder), **({"tasks_per_step": 4, "positions_per_document": 2} | (data or {}))
        ),
        ckpt_path=str(resume) if resume else None,
    )


@pytest.mark.parametrize(("draws", "val_every"), [((0,), None), ((3, 0, 2), None), ((1, 0), 2)])
def test_a_run_stopped_after_any_step_goes_on_with_the_same_tasks(
    draws: tuple[int, ...], val_every: int | None, write_task_folder: Write, tmp_path: Path
) -> None:
    """14 steps of 4 tasks are more than two epochs of 26. One of Lightning's epochs has 6 steps."""
    folder = write_task_folder(tmp_path / "tasks", NUM_POSITIONS, chunk_bytes="2KB")
    fit(folder, tmp_path / "whole", 14, draws=draws, checkpoint=tmp_path / "checkpoints", val_every=val_every)
    whole = [record for record in read(tmp_path / "whole") if "step" in record]
    assert [record["step"] for record in whole] == list(range(14))
    first_epoch = [task for record in whole for task in record["tasks"] + record["drawn"]][:26]
    assert len(set(first_epoch)) == 26
    for stop in (1, 2, 5, 6, 7, 11, 12, 13):
        log = tmp_path / f"from-{stop}"
        fit(
            folder,
            log,
            14,
            draws=draws,
            resume=tmp_path / f"checkpoints/step={stop}.ckpt",
            val_every=val_every,
        )
        resumed = [record for record in read(log) if "step" in record]
        assert resumed == whole[stop:], stop


def test_steps_and_draws_follow_one_another(write_task_folder: Write, tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path / "tasks", NUM_POSITIONS)
    fit(folder, tmp_path / "plain", 6)
    fit(folder, tmp_path / "drawing", 4, draws=(2,))
    plain = [task for record in read(tmp_path / "plain") for task in record["tasks"]]
    drawing = [task for record in read(tmp_path / "drawing") for task in record["tasks"] + record["drawn"]]
    assert drawing == plain


@pytest.mark.long
def test_two_ranks_share_the_steps_of_one(write_task_folder: Write, tmp_path: Path) -> None:
    """Each step has the same tasks in the same order, each on one rank.

    Draws differ between ranks, but the ranks stay at the same place. Validation is split too.
    """
    folder = write_task_folder(tmp_path / "tasks", NUM_POSITIONS)
    data = {"tasks_per_step": 5, "num_eval_tasks": 9, "eval_batch_size": 4}
    fit(folder, tmp_path / "one", 4, val_every=4, data=data)
    fit(folder, tmp_path / "two", 4, val_every=4, data=data, strategy="ddp_spawn", devices=2)
    one, left, right = read(tmp_path / "one"), read(tmp_path / "two", 0), read(tmp_path / "two", 1)
    assert [a["tasks"] + b["tasks"] for a, b in zip(left[:4], right[:4], strict=True)] == [
        record["tasks"] for record in one[:4]
    ]
    assert [len(record["tasks"]) for record in left[:4]] == [2] * 4
    assert len(one[4:]) == len(left[4:]) == len(right[4:]) == 3
    assert [a["validation"] + b["validation"] for a, b in zip(left[4:], right[4:], strict=True)] == [
        record["validation"] for record in one[4:]
    ]
    assert [len(record["validation"]) for record in left[4:]] == [2, 2, 0]


class UnevenRecorder(Recorder):
    def wanted(self, step: int) -> list[int]:
        return [[3, 0], [0, 0], [1, 2]][step]


@pytest.mark.long
def test_ranks_draw_what_each_needs_from_one_place(
    write_task_folder: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_task_folder(tmp_path / "tasks", NUM_POSITIONS)
    fit(folder, tmp_path / "plain", 6)
    monkeypatch.setattr(f"{__name__}.Recorder", UnevenRecorder)
    fit(folder, tmp_path / "two", 3, strategy="ddp_spawn", devices=2)
    left, right = read(tmp_path / "two", 0), read(tmp_path / "two", 1)
    assert [len(record["drawn"]) for record in left] == [3, 0, 1]
    assert [len(record["drawn"]) for record in right] == [0, 0, 2]
    taken = [
        task
        for a, b in zip(left, right, strict=True)
        for task in a["tasks"] + b["tasks"] + a["drawn"] + b["drawn"]
    ]
    assert taken == [task for record in read(tmp_path / "plain") for task in record["tasks"]][: len(taken)]


def test_a_checkpoint_of_another_folder_is_refused(write_task_folder: Write, tmp_path: Path) -> None:
    fit(
        write_task_folder(tmp_path / "tasks", NUM_POSITIONS),
        tmp_path / "log",
        1,
        checkpoint=tmp_path / "checkpoints",
    )
    other = write_task_folder(tmp_path / "other", [3, 3, 3])
    with pytest.raises(ValueError, match=r"--ckpt_path: .* number of documents 7, and this run has 3"):
        fit(other, tmp_path / "log", 2, resume=tmp_path / "checkpoints/step=1.ckpt")


def test_a_checkpoint_of_other_text_with_equal_counts_is_refused(
    write_task_folder: Write, tmp_path: Path
) -> None:
    fit(
        write_task_folder(tmp_path / "tasks", NUM_POSITIONS),
        tmp_path / "log",
        1,
        checkpoint=tmp_path / "checkpoints",
    )
    other = write_task_folder(tmp_path / "other", NUM_POSITIONS, corpus={"sha256": "1" * 64})
    with pytest.raises(
        ValueError, match=r"--ckpt_path: .* text with the fingerprint 0000.*, and this run has 1111"
    ):
        fit(other, tmp_path / "log", 2, resume=tmp_path / "checkpoints/step=1.ckpt")


def test_a_checkpoint_of_the_same_documents_in_other_shards_is_refused(
    write_task_folder: Write, tmp_path: Path
) -> None:
    """Shards are shuffled, so the order differs although text and counts are the same."""
    folder = write_task_folder(tmp_path / "tasks", NUM_POSITIONS, chunk_bytes="2KB")
    other = write_task_folder(tmp_path / "other", NUM_POSITIONS)
    assert TaskFolder(folder, "train").chunk_sizes != TaskFolder(other, "train").chunk_sizes
    fit(folder, tmp_path / "log", 1, checkpoint=tmp_path / "checkpoints")
    with pytest.raises(
        ValueError,
        match=r"--ckpt_path: .* documents in the order with the fingerprint [0-9a-f]{16}, "
        r"and this run has [0-9a-f]{16};",
    ):
        fit(other, tmp_path / "log", 2, resume=tmp_path / "checkpoints/step=1.ckpt")


def text_module(folder: Path) -> TextDataModule:
    module = TextDataModule(str(folder), documents_per_step=1)
    module.setup("fit")
    return module


MADE_WITH = {
    "tokenizer": "models/tiny",
    "proxy": "models/tiny",
    "source": {},
    "chunk_bytes": "64MB",
    "seed": 0,
    "max_documents": None,
}


@pytest.mark.parametrize(
    ("num_positions", "settings"),
    [([1, 2, 2], {"seed": 1}), ([1, 2, 2], {"max_documents": 3}), ([2, 1, 2], {})],
    ids=["seed", "sample", "positions"],
)
def test_a_place_among_documents_that_prepare_chose_otherwise_is_refused(
    num_positions: list[int], settings: dict[str, Any], write_task_folder: Write, tmp_path: Path
) -> None:
    """Each whole document is one item, so a different split of the same corpus often has the same counts."""
    state = text_module(write_task_folder(tmp_path / "tasks", [1, 2, 2], settings=MADE_WITH)).state_dict()
    other = text_module(write_task_folder(tmp_path / "other", num_positions, settings=MADE_WITH | settings))
    with pytest.raises(ValueError, match=r"--ckpt_path: .* documents in the order with the fingerprint"):
        other.load_state_dict(state)


def test_a_place_goes_with_the_folder_to_a_machine_where_files_have_other_names(
    write_task_folder: Write, tmp_path: Path
) -> None:
    before = text_module(write_task_folder(tmp_path / "tasks", [1, 2, 2], settings=MADE_WITH))
    next(iter(before.train_dataloader()))
    elsewhere = {
        "tokenizer": "/data/tiny",
        "proxy": "/data/tiny",
        "source": {"path": "/data"},
        "chunk_bytes": "1GB",
    }
    after = text_module(write_task_folder(tmp_path / "other", [1, 2, 2], settings=MADE_WITH | elsewhere))
    after.load_state_dict(before.state_dict())
    assert after.stream.place == Place(epoch=0, index=1)


def test_validating_a_checkpoint_on_another_folder(write_task_folder: Write, tmp_path: Path) -> None:
    fit(
        write_task_folder(tmp_path / "tasks", NUM_POSITIONS),
        tmp_path / "log",
        1,
        checkpoint=tmp_path / "checkpoints",
    )
    other = write_task_folder(tmp_path / "other", [3, 3, 3])
    module, data = Recorder(tmp_path / "val"), TokenTaskDataModule(str(other), tasks_per_step=1)
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        module, datamodule=data, ckpt_path=str(tmp_path / "checkpoints/step=1.ckpt"), weights_only=True
    )
    assert [len(record["validation"]) for record in read(tmp_path / "val")] == [9]


def module_of(folder: Path, **settings: Any) -> TokenTaskDataModule:
    module = TokenTaskDataModule(str(folder), **({"tasks_per_step": 4} | settings))
    module.setup("fit")
    return module


def test_the_loader_has_a_length_and_makes_batches_when_asked(
    write_task_folder: Write, tmp_path: Path
) -> None:
    module = module_of(write_task_folder(tmp_path / "tasks", NUM_POSITIONS))
    loader = module.train_dataloader()
    assert len(loader) == 26 // 4
    batches = iter(loader)
    assert module.stream.place.index == 0
    next(batches)
    assert module.stream.place.index == 4


def test_validation_is_fixed_spread_and_independent_of_the_batch_size(
    write_task_folder: Write, tmp_path: Path
) -> None:
    folder = write_task_folder(tmp_path / "tasks", NUM_POSITIONS)

    def tasks(**settings: Any) -> list[str]:
        return [
            task.task_id for batch in module_of(folder, **settings).val_dataloader() for task in batch.tasks
        ]

    chosen = tasks(num_eval_tasks=10, eval_batch_size=3)
    assert chosen == tasks(num_eval_tasks=10, eval_batch_size=100)
    assert len(set(chosen)) == 10
    documents = [task.split(":")[0] for task in chosen]
    # Each of the 7 documents once, then three of them twice.
    assert set(documents) == {f"heldout-{index}" for index in range(7)}
    assert documents == sorted(documents)
    assert chosen != tasks(num_eval_tasks=10, eval_batch_size=3, seed=1)
    everything = module_of(folder, num_eval_tasks=100, eval_min_entropy=1.5).eval_tasks()
    assert {task.task_id for task in everything} == {
        f"heldout-{index}:{k + 1}"
        for index, count in enumerate(NUM_POSITIONS)
        for k in range(count)
        if 0.6 + 1.4 * k / max(count - 1, 1) > 1.5
    }
    with pytest.raises(ValueError, match=r"--data.eval_min_entropy 9\.0: .* holds no held-out position"):
        module_of(folder, eval_min_entropy=9.0).eval_tasks()


def test_bad_settings(write_task_folder: Write, tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path / "tasks", NUM_POSITIONS)
    with pytest.raises(ValueError, match=r"--data.tasks_per_step 27: .* has only 26 to train on"):
        module_of(folder, tasks_per_step=27)
    with pytest.raises(ValueError, match=r"--data.tasks_per_step 0: must be at least 1"):
        module_of(folder, tasks_per_step=0)
    with pytest.raises(ValueError, match=r"--data.positions_per_document 0: must be at least 1"):
        module_of(folder, positions_per_document=0)
    with pytest.raises(ValueError, match=r"--data.max_context_tokens 0: must be at least 1"):
        module_of(folder, max_context_tokens=0)


def test_a_model_with_another_tokenizer_is_refused(write_task_folder: Write, tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path / "tasks", NUM_POSITIONS)
    module = Recorder(tmp_path / "log")
    module.tokenizer_hash = "1" * 16  # type: ignore[assignment]
    with pytest.raises(
        ValueError,
        match=r"prepared with the tokenizer of 'models/tiny', which is not that of the model being trained",
    ):
        Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).fit(
            module, datamodule=TokenTaskDataModule(str(folder), tasks_per_step=4)
        )


@pytest.mark.parametrize("change", [None, "same ids", "other ids"])
def test_a_folder_of_before_is_taken_where_it_is_right(
    change, write_task_folder: Write, tiny_tokenizer, tmp_path: Path
) -> None:
    """The old hash did not cover the pre-tokeniser, so the documents' tokens are compared instead."""
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    if change == "same ids":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=False), backend.pre_tokenizer]
        )
    elif change == "other ids":  # every character alone
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex("."), "isolated"), backend.pre_tokenizer]
        )
    other = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tiny_tokenizer.eos_token, pad_token=tiny_tokenizer.pad_token
    )
    folder = write_task_folder(
        tmp_path / "tasks", [30, 30], tokenizer_hash=earlier_tokenizer_hash(tiny_tokenizer)
    )
    text = "the sum of the numbers and the length of the string"  # it has letters that merge
    data = TokenTaskDataModule(str(folder), tasks_per_step=4)
    data.train = TaskFolder(folder, "train")
    data.train.token_ids = (  # type: ignore[method-assign]
        lambda index: TokenBytes(tiny_tokenizer).encode_plain(text * 3)
    )
    module = SimpleNamespace(tokenizer=other, tokenizer_hash=tokenizer_hash(other))
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    if change == "other ids":
        with pytest.raises(ValueError, match="which is not that of the model being trained"):
            data._check_tokenizer()
    else:
        data._check_tokenizer()
