"""Answers after a thought that the policy did not write: it goes on inside the box, so what differs from an ordinary answer is the thought alone."""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.types import Completion, GenerationRequest, SamplingSettings, Task, TokenIds


def forced_answers(
    rollouter: Rollouter, tasks: Sequence[Task], thoughts: Sequence[TokenIds | None], *, max_tokens: int
) -> list[Completion | None]:
    r"""What the policy writes, greedily, behind each task's given thought and ``\boxed{``. A collective, as the rollouter's own calls are.

    None without a thought, or where prompt, thought and answer are longer than the engine takes.
    """
    engine, objective = rollouter.engine, rollouter.objective
    sampling = SamplingSettings(
        temperature=0.0, max_tokens=max_tokens, stop_token_ids=objective.prompt.stop_token_ids
    )
    requests: dict[int, GenerationRequest] = {}
    for index, (task, thought) in enumerate(zip(tasks, thoughts, strict=True)):
        if thought is None:
            continue
        prompt_ids = objective.prompt.prompt_ids(task.context_ids) + objective.prompt.answer_prefix_ids(
            thought
        )
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
