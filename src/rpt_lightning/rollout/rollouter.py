"""From tasks to paid groups of completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rpt_lightning.rollout.engine import RolloutEngine
from rpt_lightning.rollout.seeds import request_seed
from rpt_lightning.tasks.objective import BoundObjective
from rpt_lightning.types import Completion, GenerationRequest, RolloutGroup, SamplingSettings, Task

Generate = Callable[[Sequence[GenerationRequest]], list[list[Completion]]]
FirstTokenProbs = Callable[[Sequence[Task], Sequence[Sequence[bytes | None]]], Sequence[Sequence[float]]]


class Rollouter:
    """Asks the engine for a group of completions a task, reads the predictions and pays them.

    Args:
        engine: Started and holding weights by the time of ``rollout``.
        objective: What is asked and what is paid.
        run_seed: The run's; every completion has its own seed derived from it, the policy version, the task and the completion's index.
        group_size: Completions a task for training, at least 2 (a group of one has no baseline).
        temperature: Of training rollouts.
        max_tokens: Of a completion.
        top_p, top_k, min_p: 1, 0 and 0: pure temperature sampling.
        stop_after_first_box: A completion ends with its first box (a change of the paper's rule, docs/decisions.md).
        max_prompt_tokens: A longer prompt is an error; None leaves the limit to the engine.
        masks_truncated: Truncated completions are not trained, and so make no group live.
        first_token_probs: The policy's probability of each prediction's first token, asked directly; needed by the dense rewards only.
        share_work: Wraps the engine's ``generate`` where several processes roll out together. It may be a collective: each calls ``rollout`` and
            ``complete`` equally often, with no tasks where it has none.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        objective: BoundObjective,
        *,
        run_seed: int,
        group_size: int = 8,
        temperature: float = 0.8,
        max_tokens: int = 1024,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop_after_first_box: bool = False,
        max_prompt_tokens: int | None = None,
        masks_truncated: bool = False,
        first_token_probs: FirstTokenProbs | None = None,
        share_work: Callable[[Generate], Generate] | None = None,
    ) -> None:
        if group_size < 2:
            raise ValueError(
                f"group_size={group_size}: a group needs at least 2 completions, since each is judged against the others"
            )
        if temperature <= 0:
            raise ValueError(
                f"temperature={temperature}: greedy completions of a group are all the same, so a rollout needs a positive temperature"
            )
        if objective.reward.needs_first_token_probs and first_token_probs is None:
            raise ValueError(
                f"{type(objective.reward).__name__} is paid by the policy's probability of the first token: give first_token_probs"
            )
        self.engine = engine
        self.objective = objective
        self.run_seed = run_seed
        self.group_size = group_size
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.stop_after_first_box = stop_after_first_box
        self.max_prompt_tokens = max_prompt_tokens
        self.masks_truncated = masks_truncated
        self.first_token_probs = first_token_probs
        self.share_work = share_work
        self._num_drawn: Counter[str] = Counter()  # completions of each task with the weights of this version
        self._version: int | None = None

    def sampling(self, *, temperature: float, max_tokens: int) -> SamplingSettings:
        """How such completions are drawn."""
        return SamplingSettings(
            temperature=temperature,
            max_tokens=max_tokens,
            stop_token_ids=self.objective.prompt.stop_token_ids,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            stop_after_first_box=self.stop_after_first_box,
            think_close=self.objective.prompt.think_close,
        )

    def rollout(
        self, tasks: Sequence[Task], *, n: int | None = None, temperature: float | None = None
    ) -> list[RolloutGroup]:
        """One group a task, in the order of the tasks.

        Args:
            tasks: One that is given again, in this call or a later one with the same weights (a small corpus starts over), gets other
                completions. So a group may be drawn in parts.
            n: Completions a task; None: ``group_size``. 1 is for evaluation.
            temperature: None: the training temperature; 0: greedy, the same whenever it is asked.

        Raises:
            ValueError: A prompt is too long.
            RuntimeError: A completion does not come from the engine's present weights.
        """
        n = self.group_size if n is None else n
        temperature = self.temperature if temperature is None else temperature
        first_indices = self.reserve(tasks, n) if temperature > 0 else [0] * len(tasks)
        return self.groups(tasks, self.complete(tasks, first_indices, n, temperature=temperature))

    def reserve(self, tasks: Sequence[Task], n: int) -> list[int]:
        """For each task the index of the first of ``n`` completions that nobody has drawn with the present weights, nor will."""
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
        """For each task its completions ``first_index`` to ``first_index + n - 1``; raises as ``rollout`` does."""
        temperature = self.temperature if temperature is None else temperature
        max_tokens = self.max_tokens if max_tokens is None else max_tokens
        requests = [
            self._request(task, n, temperature, first_index, max_tokens)
            for task, first_index in zip(tasks, first_indices, strict=True)
        ]
        # Positions of a document next to each other, the shorter context first: each finds the one before it in the prefix cache.
        order = sorted(range(len(tasks)), key=lambda index: (tasks[index].doc_id, tasks[index].position))
        rows = self.generate([requests[index] for index in order])
        completions = dict(zip(order, map(tuple, rows), strict=True))
        self._check_versions(tasks, completions)
        return [completions[index] for index in range(len(tasks))]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """The engine's ``generate``, together with the other processes where there are any."""
        generate = self.engine.generate if self.share_work is None else self.share_work(self.engine.generate)
        return generate(requests)

    def groups(
        self, tasks: Sequence[Task], completions: Sequence[tuple[Completion, ...]]
    ) -> list[RolloutGroup]:
        """The groups that given completions make: read and paid. With several ranks the policy may be asked too, so every rank calls it."""
        predictions = [tuple(map(self.objective.prediction, row)) for row in completions]
        probs = (
            self.first_token_probs(tasks, predictions)
            if self.first_token_probs is not None
            else [None] * len(tasks)
        )
        return [
            RolloutGroup(
                task=task,
                prompt_ids=self.objective.prompt.prompt_ids(task.context_ids),
                completions=completions[index],
                predictions=predictions[index],
                rewards=self.objective.rewards(task, predictions[index], probs[index]),
                masks_truncated=self.masks_truncated,
            )
            for index, task in enumerate(tasks)
        ]

    def _request(
        self, task: Task, n: int, temperature: float, first_index: int, max_tokens: int
    ) -> GenerationRequest:
        prompt_ids = self.objective.prompt.prompt_ids(task.context_ids)
        if self.max_prompt_tokens is not None and len(prompt_ids) > self.max_prompt_tokens:
            raise ValueError(
                f"task {task.task_id!r}: its prompt has {len(prompt_ids)} tokens, max_prompt_tokens={self.max_prompt_tokens}; "
                "raise the limit or cut contexts to it when tasks are made"
            )
        sampling = self.sampling(temperature=temperature, max_tokens=max_tokens)
        version = (
            -1 if self.engine.version is None else self.engine.version
        )  # without weights the engine itself refuses
        seed = request_seed(self.run_seed, version, task.task_id, first_index)
        return GenerationRequest(
            task_id=task.task_id, prompt_ids=prompt_ids, n=n, seed=seed, sampling=sampling, doc_id=task.doc_id
        )

    def _check_versions(self, tasks: Sequence[Task], completions: dict[int, tuple[Completion, ...]]) -> None:
        for index, task in enumerate(tasks):
            versions = {completion.policy_version for completion in completions[index]}
            if versions != {self.engine.version}:
                raise RuntimeError(
                    f"task {task.task_id!r}: completions of policy versions {sorted(versions)}, the engine holds {self.engine.version}"
                )
