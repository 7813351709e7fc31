"""Turn tasks into rewarded groups of completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.seeds import request_seed
from rpt_lightning.rollout.settings import Sampling
from rpt_lightning.types import (
    AnsweredTask,
    Completion,
    GenerationRequest,
    RolloutGroup,
    SamplingSettings,
    Task,
    TrainSequence,
)

Generate = Callable[[Sequence[GenerationRequest]], list[list[Completion]]]
Score = Callable[[Sequence[TrainSequence]], Sequence[tuple[float, ...]]]
"""Returns the policy's log-probs (nats, temperature 1) of each sequence's target tokens. A collective."""


class Rollouter:
    """Generates a group of completions for each task, reads the predictions and rewards them.

    Args:
        engine: An engine that is started and holds weights when ``rollout`` is called.
        objective: Defines the prompt and the reward.
        run_seed: Seed of the run. Every completion's seed is derived from it, the policy version, the task
            and the completion's index.
        group_size: Completions for each task in training. At least 2, since a group of one has no baseline.
        sampling: How completions are drawn. None: with the defaults.
        max_prompt_tokens: Raise an error for longer prompts. None leaves the limit to the engine.
        masks_truncated: Do not train truncated completions. They are also ignored when the rewards of a group
            are compared.
        score: Asks the policy for log-probs. Only an objective that ``needs_logprobs`` needs it.
        share_work: Wraps the engine's ``generate`` if several processes roll out together. It may be a
            collective, so each process must call ``rollout`` and ``complete`` equally often, with no tasks if
            it has none.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        objective: BoundObjective,
        *,
        run_seed: int,
        group_size: int = 8,
        sampling: Sampling | None = None,
        max_prompt_tokens: int | None = None,
        masks_truncated: bool = False,
        score: Score | None = None,
        share_work: Callable[[Generate], Generate] | None = None,
    ) -> None:
        if group_size < 2:
            raise ValueError(
                f"group_size={group_size}: a group needs at least 2 completions, "
                "since each is compared with the others"
            )
        sampling = sampling or Sampling()
        if sampling.temperature <= 0:
            raise ValueError(
                f"rollout.sampling.temperature={sampling.temperature}: greedy completions of a group are all "
                "the same, so a rollout needs a positive temperature"
            )
        if objective.objective.needs_logprobs and score is None:
            raise ValueError(
                f"{type(objective.objective.rewarder).__name__} depends on the policy's log-probs: give score"
            )
        self.engine = engine
        self.objective = objective
        self.run_seed = run_seed
        self.group_size = group_size
        self.sampling = sampling
        self.max_prompt_tokens = max_prompt_tokens
        self.masks_truncated = masks_truncated
        self.score = score
        self.share_work = share_work
        self._num_drawn: Counter[str] = Counter()  # completions of each task drawn with the current version
        self._version: int | None = None

    def request_sampling(
        self, *, temperature: float | None = None, max_tokens: int | None = None
    ) -> SamplingSettings:
        """Return what the engine is asked for. None takes the temperature or length of training rollouts."""
        own = self.sampling
        return SamplingSettings(
            temperature=own.temperature if temperature is None else temperature,
            max_tokens=own.max_completion_tokens if max_tokens is None else max_tokens,
            stop_token_ids=self.objective.prompt.stop_token_ids,
            top_p=own.top_p,
            top_k=own.top_k,
            min_p=own.min_p,
            stop_after_first_box=own.stop_after_first_box,
            think_close=self.objective.prompt.think_close,
            tokens_after_thought=self.objective.objective.tokens_after_thought,
        )

    def rollout(
        self, tasks: Sequence[Task], *, n: int | None = None, temperature: float | None = None
    ) -> list[RolloutGroup]:
        """Return one group for each task, in order.

        Args:
            tasks: The tasks. One that appears again with the same weights, in this call or a later one (a
                small corpus starts over), gets different completions. A group may therefore be drawn in
                parts.
            n: Completions for each task. None means ``group_size``. Evaluation uses 1.
            temperature: None means the training temperature. 0 is greedy and gives the same result each time.

        Raises:
            ValueError: A prompt is too long.
            RuntimeError: A completion does not come from the engine's current weights.
        """
        n = self.group_size if n is None else n
        return self.groups(tasks, self._drawn(tasks, n, temperature))

    def predict(
        self, tasks: Sequence[Task], *, n: int, temperature: float | None = None
    ) -> list[RolloutGroup]:
        """Return one group of ``n`` completions for each held-out task, like `rollout`.

        The rewards are 1 for right predictions and 0 for others. The objective's own reward is not computed.
        Held-out accuracy does not depend on it, and it may query the policy or a judge.
        """
        completions = self._drawn(tasks, n, temperature)
        return [
            self._group(one, tuple(float(self.objective.is_right(p, one.task)) for p in one.predictions))
            for one in self._read(tasks, completions)
        ]

    def _drawn(
        self, tasks: Sequence[Task], n: int, temperature: float | None
    ) -> list[tuple[Completion, ...]]:
        temperature = self.sampling.temperature if temperature is None else temperature
        first_indices = self.reserve(tasks, n) if temperature > 0 else [0] * len(tasks)
        return self.complete(tasks, first_indices, n, temperature=temperature)

    def reserve(self, tasks: Sequence[Task], n: int) -> list[int]:
        """Reserve ``n`` unused completion indices for each task with the current weights.

        Returns the first index for each task. Nobody else gets these indices.
        """
        if self.engine.version != self._version:
            self._num_drawn, self._version = Counter(), self.engine.version
        first_indices = []
        for task in tasks:
            first_indices.append(self._num_drawn[task.task_id])
            self._num_drawn[task.task_id] += n
        return first_indices

    def complete(
        self,
        tasks: Sequence[Task],
        first_indices: Sequence[int],
        n: int,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Return completions ``first_index`` to ``first_index + n - 1`` of each task.

        Raises the errors of ``rollout``.
        """
        sampling = self.request_sampling(temperature=temperature, max_tokens=max_tokens)
        requests = [
            self._request(task, n, sampling, first_index)
            for task, first_index in zip(tasks, first_indices, strict=True)
        ]
        # Positions of a document are next to each other, shorter contexts first, so each finds the previous
        # one in the prefix cache.
        order = sorted(range(len(tasks)), key=lambda index: (tasks[index].doc_id, tasks[index].position))
        rows = self.generate([requests[index] for index in order])
        completions = dict(zip(order, map(tuple, rows), strict=True))
        self._check_versions(tasks, completions)
        return [completions[index] for index in range(len(tasks))]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """Call the engine's ``generate``, together with the other processes if there are any."""
        generate = self.engine.generate if self.share_work is None else self.share_work(self.engine.generate)
        return generate(requests)

    def groups(
        self, tasks: Sequence[Task], completions: Sequence[tuple[Completion, ...]]
    ) -> list[RolloutGroup]:
        """Read and reward completions, and return them as groups.

        With several ranks, the policy may be queried too, so every rank must call this.
        """
        return self.rewarded(self.answered(tasks, completions))

    def answered(
        self, tasks: Sequence[Task], completions: Sequence[tuple[Completion, ...]]
    ) -> list[AnsweredTask]:
        """Read completions, and ask the policy for the log-probs that the objective needs."""
        answered = self._read(tasks, completions)
        return self._scored(answered) if self.objective.objective.needs_logprobs else answered

    def rewarded(self, answered: Sequence[AnsweredTask]) -> list[RolloutGroup]:
        """Reward completions, and return them as groups."""
        return [self._group(one, self.objective.rewards(one)) for one in answered]

    def _read(
        self, tasks: Sequence[Task], completions: Sequence[tuple[Completion, ...]]
    ) -> list[AnsweredTask]:
        return [
            AnsweredTask(
                task=task,
                prompt_ids=self.objective.prompt_ids(task),
                completions=row,
                predictions=tuple(map(self.objective.prediction, row)),
            )
            for task, row in zip(tasks, completions, strict=True)
        ]

    def _group(self, answered: AnsweredTask, rewards: tuple[float, ...]) -> RolloutGroup:
        return RolloutGroup(
            task=answered.task,
            prompt_ids=answered.prompt_ids,
            completions=answered.completions,
            predictions=answered.predictions,
            rewards=rewards,
            truth=self.objective.truth(answered.task),
            masks_truncated=self.masks_truncated,
            num_trained=tuple(map(self.objective.num_trained, answered.completions)),
            follow_ups=answered.follow_ups,
            num_prefix_tokens=len(self.objective.prompt_of(answered.task).prefix_ids),
        )

    def _scored(self, answered: Sequence[AnsweredTask]) -> list[AnsweredTask]:
        """Add the log-probs that the objective asks for. One call of the policy scores all tasks."""
        assert self.score is not None
        wanted = [self.objective.scored_sequences(one) for one in answered]
        scores = iter(self.score([sequence for row in wanted for sequence in row if sequence is not None]))
        return [
            replace(one, logprobs=tuple(None if sequence is None else next(scores) for sequence in row))
            for one, row in zip(answered, wanted, strict=True)
        ]

    def _request(self, task: Task, n: int, sampling: SamplingSettings, first_index: int) -> GenerationRequest:
        prompt_ids = self.objective.prompt_ids(task)
        if self.max_prompt_tokens is not None and len(prompt_ids) > self.max_prompt_tokens:
            raise ValueError(
                f"task {task.task_id!r}: its prompt has {len(prompt_ids)} tokens, "
                f"max_prompt_tokens={self.max_prompt_tokens}; raise the limit or "
                "cut contexts to it when tasks are made"
            )
        # Without weights, the engine itself refuses to generate.
        version = -1 if self.engine.version is None else self.engine.version
        seed = request_seed(self.run_seed, version, task.task_id, first_index)
        return GenerationRequest(
            task_id=task.task_id, prompt_ids=prompt_ids, n=n, seed=seed, sampling=sampling, doc_id=task.doc_id
        )

    def _check_versions(self, tasks: Sequence[Task], completions: dict[int, tuple[Completion, ...]]) -> None:
        for index, task in enumerate(tasks):
            versions = {completion.policy_version for completion in completions[index]}
            if versions != {self.engine.version}:
                raise RuntimeError(
                    f"task {task.task_id!r}: completions of policy versions {sorted(versions)}, the engine "
                    f"holds {self.engine.version}"
                )
