"""Compare rollouts, from tasks to rewarded groups, with a bare `LLM.generate` of the same prompts.

    python benchmarks/bench_rollout.py --repeats 5

One vLLM engine in this process generates for both, in turn, with the same sampling and seeds and an empty
prefix cache. Besides generation, the timing covers our own part: prompts, requests, counting, parsing and
rewards. The limit is 1.0. A second figure shows how much of what prompts share comes from the cache.

The policy is a random model of SmolLM2-135M's size, so completions run to their limit. Its tokenizer is that
of scripts/make_model.py's tiny model, because no word of its output matters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from models import SMOLLM2_135M
from result import alternate, store
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.rollout.settings import Sampling
from rpt_lightning.training.cpu_precision import bf16_is_slow
from rpt_lightning.types import Completion, GenerationRequest, RolloutGroup, TokenTask

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import make_model

TEMPERATURE = 0.8


def make_policy(folder: Path, *, short: bool) -> LlamaForCausalLM:
    """Make a random policy, and the folder of its configuration and tokenizer that an engine starts from."""
    make_model.make("tiny", folder)
    config = (
        LlamaConfig.from_pretrained(folder)
        if short
        else LlamaConfig(**SMOLLM2_135M, architectures=["LlamaForCausalLM"])
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def make_tasks(args: argparse.Namespace) -> list[TokenTask]:
    """Make documents of random tokens with ``positions`` tasks each.

    The last task of a document is at ``--context`` tokens, and the others precede it 16 tokens apart. Tasks
    are mixed, as those of a step may be.
    """
    numbers = torch.Generator().manual_seed(0)
    tasks = []
    for document in range(args.tasks // args.positions):
        ids = torch.randint(20, 500, (args.context + 1,), generator=numbers).tolist()
        for k in range(args.positions):
            position = args.context - 16 * k
            task = TokenTask(
                task_id=f"{document}:{position}", doc_id=str(document), position=position,
                context_ids=tuple(ids[:position]), continuation_ids=(ids[position],), continuation=(b"?",),
                entropy=1.0, true_prob=0.5, true_rank=0, answerable=True,
            )  # fmt: skip
            tasks.append(task)
    return [tasks[index] for index in torch.randperm(len(tasks), generator=numbers).tolist()]


class Paths:
    """Our path and the bare one, on one engine. Each keeps what it generated last."""

    def __init__(
        self, engine: VLLMEngine, objective: BoundObjective, tasks: list[TokenTask], args: argparse.Namespace
    ) -> None:
        self.engine, self.objective, self.tasks, self.args = engine, objective, tasks, args
        self.requests: Sequence[GenerationRequest] = ()
        self.groups: list[RolloutGroup] = []
        self.outputs: list[Any] = []

    def _rollouter(self) -> Rollouter:
        """Make a new rollouter. It has drawn nothing yet, so every round has the same seeds."""
        return Rollouter(
            self.engine,
            self.objective,
            run_seed=0,
            group_size=self.args.group,
            sampling=Sampling(temperature=TEMPERATURE, max_completion_tokens=self.args.completion),
        )

    def _empty_cache(self) -> None:
        assert self.engine._llm.reset_prefix_cache()
        self.engine._forget_prompts()

    def ours(self) -> None:
        self._empty_cache()
        self.groups = self._rollouter().rollout(self.tasks)

    def bare(self) -> None:
        from vllm import SamplingParams

        self._empty_cache()
        sampling = [
            SamplingParams(
                n=request.n, seed=request.seed, temperature=TEMPERATURE, max_tokens=self.args.completion,
                logprobs=0, detokenize=False, ignore_eos=True,
                stop_token_ids=list(request.sampling.stop_token_ids),
            )
            for request in self.requests
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in self.requests]
        self.outputs = self.engine._llm.generate(prompts, sampling, use_tqdm=False)

    def capture_requests(self) -> None:
        """Record what our path asks the engine for, in its order."""
        generate = self.engine.generate

        def listen(requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
            self.requests = requests
            return generate(requests)

        self.engine.generate = listen  # type: ignore[method-assign]
        self.ours()
        self.engine.generate = generate  # type: ignore[method-assign]

    def check(self) -> int:
        """Check that both generated the same tokens, and return their number."""
        ours = {
            group.task.task_id: [completion.token_ids for completion in group.completions]
            for group in self.groups
        }
        bare = {
            request.task_id: [tuple(part.token_ids) for part in output.outputs]
            for request, output in zip(self.requests, self.outputs, strict=True)
        }
        assert ours == bare
        return sum(len(token_ids) for row in ours.values() for token_ids in row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {
        "context": 250,
        "completion": 24,
        "group": 8,
        "positions": 4,
        "tasks": 32,
        "repeats": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--short",
        action="store_true",
        help="run a tiny model and small shapes for a few seconds, store nothing",
    )
    args = parser.parse_args()
    if args.short:
        args.completion, args.tasks, args.repeats = 8, 8, 2

    with tempfile.TemporaryDirectory(prefix="bench-rollout-") as temporary:
        folder = Path(temporary) / "model"
        policy = make_policy(folder, short=args.short)
        objective = NextTokenObjective(ContinuationPrompt(), PrefixMatchReward()).bind(
            AutoTokenizer.from_pretrained(folder)
        )
        length = args.context + objective.prompt.num_overhead_tokens + args.completion
        with VLLMEngine(
            dtype="float32" if args.short or bf16_is_slow() else "bfloat16",
            kv_cache_gib=0.25 if args.short else 1.0,
        ) as engine:
            engine.start(str(folder), seed=0, max_model_len=length)
            engine.update_weights(policy.named_parameters(remove_duplicate=False), version=0)
            paths = Paths(engine, objective, make_tasks(args), args)
            before = engine.prompt_tokens
            paths.capture_requests()
            prompts = engine.prompt_tokens - before
            seconds = alternate({"ours": paths.ours, "bare": paths.bare}, args.repeats)
            num_tokens = paths.check()
            print(engine.description)

    print(
        f"{num_tokens:,} tokens in each round: ours {num_tokens / seconds['ours']:,.0f} tokens/s, "
        f"bare {num_tokens / seconds['bare']:,.0f} tokens/s"
    )
    print(
        f"prompt tokens of all completions: {prompts.total:,}, shareable in whole blocks "
        f"{prompts.shareable:,}, from the cache {prompts.cached:,}"
    )
    shape = f"p{args.context}-c{args.completion}-g{args.group}-k{args.positions}"
    store(
        f"rollout-vs-llm-generate-{shape}", seconds["bare"] / seconds["ours"], limit=1.0, target=0.95,
        unit="times the tokens/s of a bare LLM.generate", keep=not args.short,
    )  # fmt: skip
    store(
        f"rollout-cache-share-{shape}", prompts.cached / prompts.shareable, limit=1.0, target=0.9,
        unit="of the shareable prompt tokens come from the cache", keep=not args.short,
    )  # fmt: skip


if __name__ == "__main__":
    main()
