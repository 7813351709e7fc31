"""Answers after a thought that the policy did not write.

The policy continues where its answer stands, so the thought is the only difference from an ordinary answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.types import Completion, GenerationRequest, SamplingSettings, Task, TokenIds


def forced_answers(
    rollouter: Rollouter, tasks: Sequence[Task], thoughts: Sequence[TokenIds | None], *, max_tokens: int
) -> list[Completion | None]:
    r"""Return what the policy writes, greedily, after each task's given thought and what opens an answer.

    The result is None for a task without a thought, and if prompt, thought and answer exceed the engine's
    limit. Like the rollouter's own calls, this is a collective.
    """
    engine, objective = rollouter.engine, rollouter.objective
    sampling = SamplingSettings(
        temperature=0.0, max_tokens=max_tokens, stop_token_ids=objective.prompt.stop_token_ids
    )
    requests: dict[int, GenerationRequest] = {}
    for index, (task, thought) in enumerate(zip(tasks, thoughts, strict=True)):
        if thought is None:
            continue
        prompt_ids = objective.prompt_ids(task) + objective.answer_prefix_ids(thought)
        if len(prompt_ids) + max_tokens <= engine.max_model_len:
            requests[index] = GenerationRequest(
                task_id=task.task_id,
                prompt_ids=prompt_ids,
                n=1,
                seed=0,
                sampling=sampling,
                doc_id=task.doc_id,
            )
    answers: list[Completion | None] = [None] * len(tasks)
    for index, (completion,) in zip(requests, rollouter.generate(list(requests.values())), strict=True):
        answers[index] = completion
    return answers
