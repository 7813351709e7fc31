"""Forward and backward of one training step on identical rollouts: ours (prefixes shared), the plain padded step, and TRL's own log-prob and loss path.

    python benchmarks/bench_train_step.py --prompt 1024 --completion 128 --positions 1 --repeats 5

TRL takes part where `pip install trl==1.16.0` was done. The policy is a random model of SmolLM2-135M's size in fp32. The limit is what the FLOPs of body, head
on completion tokens and attention over permitted pairs allow.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from models import SMOLLM2_135M
from result import alternate, store
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rpt_lightning.policy.logprobs import chosen_logprobs
from rpt_lightning.policy.packing import pack
from rpt_lightning.policy.tree_attention import NAME as TREE_ATTENTION
from rpt_lightning.types import TrainSequence

TEMPERATURE = 0.8


def make_rollouts(args: argparse.Namespace) -> tuple[list[TrainSequence], torch.Tensor]:
    """One document, ``positions`` prompts on it that end at its last tokens, ``group`` completions each that share nothing by chance; advantages of mean 0."""
    generator = torch.Generator().manual_seed(0)
    document = torch.randint(0, 49152, (args.prompt,), generator=generator).tolist()
    sequences = []
    for position in range(args.positions):
        prompt = tuple(document[: args.prompt - 16 * (args.positions - 1 - position)])
        for _ in range(args.group):
            sequences.append(
                TrainSequence(prompt_ids=prompt, target_ids=tuple(torch.randint(0, 49152, (args.completion,), generator=generator).tolist()))
            )
    advantages = torch.randn(len(sequences), generator=generator)
    return sequences, advantages - advantages.mean()


def ours(model: PreTrainedModel, sequences: list[TrainSequence], advantages: torch.Tensor, budget: int) -> None:
    model.zero_grad()
    model.set_attn_implementation(TREE_ATTENTION)
    num_tokens = sum(len(sequence.target_ids) for sequence in sequences)
    for tree in pack(sequences, max_tokens=budget):
        hidden = model.base_model(
            input_ids=tree.token_ids[None], position_ids=tree.position_ids[None], tree=tree.tree_mask(), use_cache=False
        ).last_hidden_state[0]
        logprobs, _ = chosen_logprobs(hidden[tree.parents], model.lm_head.weight, tree.targets, temperature=TEMPERATURE)
        rows = tree.unpack(logprobs)
        (-(rows.sum(1) * advantages[list(tree.sequence_indices)]).sum() / num_tokens).backward()


def plain(model: PreTrainedModel, sequences: list[TrainSequence], advantages: torch.Tensor, rows_at_once: int = 2) -> None:
    """The same loss, each completion with its whole prompt; the head on completion tokens only."""
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    num_tokens = sum(len(sequence.target_ids) for sequence in sequences)
    for start in range(0, len(sequences), rows_at_once):
        batch = sequences[start : start + rows_at_once]
        ids, mask = left_padded(batch)
        length = len(batch[0].target_ids)
        hidden = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
        ).last_hidden_state
        part = hidden[:, -length - 1 : -1].flatten(0, 1)
        logprobs, _ = chosen_logprobs(part, model.lm_head.weight, ids[:, -length:].flatten(), temperature=TEMPERATURE)
        weights = advantages[start : start + rows_at_once].repeat_interleave(length)
        (-(logprobs * weights).sum() / num_tokens).backward()


def left_padded(batch: list[TrainSequence]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(sequence.num_tokens for sequence in batch)
    ids, mask = torch.zeros(len(batch), width, dtype=torch.int64), torch.zeros(len(batch), width, dtype=torch.int64)
    for row, sequence in enumerate(batch):
        ids[row, width - sequence.num_tokens :] = torch.tensor(sequence.prompt_ids + sequence.target_ids)
        mask[row, width - sequence.num_tokens :] = 1
    return ids, mask


class TRLPath:
    """TRL's `_get_per_token_logps_and_entropies` and `_compute_loss` on a trainer without a run, on a copy of the model that TRL's own head is put on."""

    def __init__(self, model: PreTrainedModel) -> None:
        from trl import GRPOTrainer
        from trl.trainer.utils import add_fused_lm_head

        self.model = LlamaForCausalLM(model.config)
        self.model.load_state_dict(model.state_dict())
        add_fused_lm_head(self.model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
        self.trainer = object.__new__(GRPOTrainer)
        self.trainer.__dict__ |= {
            "model": self.model, "temperature": TEMPERATURE, "args": SimpleNamespace(delta=None, steps_per_generation=1, report_to=[]),
            "accelerator": SimpleNamespace(
                num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True, autocast=nullcontext, is_main_process=True
            ),
            "_metrics": {"train": defaultdict(list)}, "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
            "importance_sampling_level": "token", "beta": 0.0, "loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.2, "use_vllm": False,
            "vllm_importance_sampling_correction": False, "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False,
        }  # fmt: skip

    def __call__(self, sequences: list[TrainSequence], advantages: torch.Tensor, rows_at_once: int = 2) -> None:
        self.model.zero_grad()
        num_tokens = torch.tensor(sum(len(sequence.target_ids) for sequence in sequences))
        for start in range(0, len(sequences), rows_at_once):
            batch = sequences[start : start + rows_at_once]
            ids, mask = left_padded(batch)
            length = len(batch[0].target_ids)
            with torch.no_grad():
                old = self.trainer._get_per_token_logps_and_entropies(self.model, ids, mask, length)[0]
            inputs = {
                "prompt_ids": ids[:, :-length], "prompt_mask": mask[:, :-length], "completion_ids": ids[:, -length:], "completion_mask": mask[:, -length:],
                "advantages": advantages[start : start + rows_at_once], "old_per_token_logps": old, "num_items_in_batch": num_tokens,
            }  # fmt: skip
            self.trainer._compute_loss(self.model, inputs).backward()


def flops(model: PreTrainedModel, sequences: list[TrainSequence], *, shared: bool) -> float:
    """Forward and backward: 6 per weight and token, 12 x hidden per layer and permitted pair of tokens."""
    config = model.config
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    head = config.vocab_size * config.hidden_size * sum(len(sequence.target_ids) for sequence in sequences)
    if shared:
        trees = list(pack(sequences, max_tokens=10**9))
        tokens = sum(tree.num_tokens for tree in trees)
        pairs = sum(int((tree.position_ids + 1).sum()) for tree in trees)
    else:
        tokens = sum(sequence.num_tokens for sequence in sequences)
        pairs = sum(sequence.num_tokens * (sequence.num_tokens + 1) // 2 for sequence in sequences)
    return 6 * (body * tokens + head) + 12 * config.hidden_size * config.num_hidden_layers * pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"prompt": 256, "completion": 24, "group": 8, "positions": 1, "repeats": 3, "budget": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M, attn_implementation="sdpa")).train()
    sequences, advantages = make_rollouts(args)

    functions = {"ours": lambda: ours(model, sequences, advantages, args.budget), "plain": lambda: plain(model, sequences, advantages)}
    trl = TRLPath(model) if importlib.util.find_spec("trl") else None
    if trl is None:
        print("trl is not installed: it takes no part")
    else:
        functions["trl"] = lambda: trl(sequences, advantages)
    check_gradients(functions, {"ours": model, "plain": model} | ({"trl": trl.model} if trl else {}))
    seconds = alternate(functions, args.repeats)

    shape = f"p{args.prompt}-c{args.completion}-g{args.group}-k{args.positions}"
    limit = flops(model, sequences, shared=False) / flops(model, sequences, shared=True)
    store(f"train-step-vs-plain-{shape}", seconds["plain"] / seconds["ours"], limit=limit, target=None, unit="times as fast as the plain padded step")
    if "trl" in seconds:
        store(
            f"train-step-vs-trl-{shape}", seconds["trl"] / seconds["ours"], limit=limit * 4 / 3, target=None, unit="times as fast as TRL 1.16's path"
        )


def check_gradients(functions: dict[str, Callable[[], None]], models: dict[str, PreTrainedModel]) -> None:
    """Nothing is timed that computes something else."""
    gradients = {}
    for name, function in functions.items():
        function()
        gradients[name] = torch.cat([parameter.grad.flatten() for parameter in models[name].parameters()])
    for name, gradient in gradients.items():
        difference = ((gradient - gradients["plain"]).norm() / gradients["plain"].norm()).item()
        print(f"relative difference of the gradients, {name} against plain: {difference:.1e}")
        assert difference < 1e-4


if __name__ == "__main__":
    main()
