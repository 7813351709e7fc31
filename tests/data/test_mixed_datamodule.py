from __future__ import annotations

import pytest

from rpt_lightning.data.modules.mixed import MixedDataModule
from rpt_lightning.data.modules.text import TextDataModule
from rpt_lightning.data.modules.traces import TraceDataModule
from rpt_lightning.objectives.prompts.template import ContinuationPrompt


def parts(task_dir):
    return TraceDataModule(
        str(task_dir), ContinuationPrompt(), traces_per_step=6, positions_per_document=2
    ), TextDataModule(str(task_dir), 2, max_tokens=32)


def opened(task_dir):
    mixed = MixedDataModule(*parts(task_dir))
    mixed.setup("fit")
    return mixed


def test_a_batch_is_a_step_of_both_parts(tiny_task_dir):
    alone = parts(tiny_task_dir)
    for part in alone:
        part.setup("fit")
    mixed = opened(tiny_task_dir)
    batches, (traces, text) = (
        iter(mixed.train_dataloader()),
        (iter(part.train_dataloader()) for part in alone),
    )
    for _ in range(3):
        assert next(batches).sequences == next(traces).sequences + next(text).sequences
    assert len(mixed.train_dataloader()) == min(len(part.train_dataloader()) for part in alone)
    assert list(mixed.val_dataloader()) == list(alone[0].val_dataloader())


def test_a_stopped_run_goes_on_where_both_parts_were(tiny_task_dir):
    first = opened(tiny_task_dir)
    batches = iter(first.train_dataloader())
    next(batches)
    second = opened(tiny_task_dir)
    second.load_state_dict(first.state_dict())
    assert next(iter(second.train_dataloader())) == next(batches)


def test_two_corpora_are_no_mixture(tiny_task_dir):
    with pytest.raises(ValueError, match="a mixture is of one corpus"):
        MixedDataModule(parts(tiny_task_dir)[0], parts("tasks/other")[1])
