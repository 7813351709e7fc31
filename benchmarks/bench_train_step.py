"""Compare forward and backward of one training step on identical rollouts: ours, the plain step and TRL's.

    python benchmarks/bench_train_step.py                                             # RPT's shapes
    python benchmarks/bench_train_step.py --prompt 1024 --completion 128 --positions 1

Ours shares prefixes, the plain step pads, and TRL's uses its own log-prob and loss path. The policy is a
random model of SmolLM2-135M's size in fp32. One position in each document means one prompt. Four mean prompts
that end 16 tokens apart on one document. The same completions are then also trained as four documents with
one position each. The limit is what the FLOPs of body, head on completion tokens and attention over permitted
pairs allow. TRL takes part if it is installed (`make bench` installs it), and only with one position, because
more positions make no difference to it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from models import SMOLLM2_135M
from result import alternate, store
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rpt_lightning.policy.attention.tree_attention import NAME as TREE_ATTENTION
from rpt_lightning.policy.flops import add_works, model_size, sequence_work, train_flops, tree_work
from rpt_lightning.policy.logprobs import chosen_logprobs
from rpt_lightning.policy.packing.trees import pack
from rpt_lightning.types import TrainSequence

TEMPERATURE = 0.8
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# The shares of the FLOP limit's ratio that we want to reach against the plain step, by positions in a
# document.
TARGET_SHARES = {1: 0.85, 4: 0.7}
# Ours should be 6 times as fast as TRL's path at (prompt, completion, group) of this shape.
TRL_TARGETS = {(1024, 128, 8): 6.0}
ROUNDS, FEWER_ROUNDS, LONG_ROUND_S = 5, 3, 100.0


def make_rollouts(
    args: argparse.Namespace, *, share_document: bool = True
) -> tuple[list[TrainSequence], torch.Tensor]:
    """Make ``positions`` prompts that end 16 tokens apart, on one document or on one document each.

    Each has ``group`` completions that share nothing by chance. The advantages have mean 0.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, args.vocabulary, (length,), generator=generator).tolist())

    document = draw(args.prompt)
    sequences = []
    for position in range(args.positions):
        length = args.prompt - 16 * (args.positions - 1 - position)
        prompt = document[:length] if share_document else draw(length)
        sequences += [
            TrainSequence(prompt_ids=prompt, target_ids=draw(args.completion)) for _ in range(args.group)
        ]
    advantages = torch.randn(len(sequences), generator=generator)
    return sequences, advantages - advantages.mean()


def ours(
    model: PreTrainedModel, sequences: list[TrainSequence], advantages: torch.Tensor, budget: int
) -> None:
    model.zero_grad()
    model.set_attn_implementation(TREE_ATTENTION)
    num_tokens = sum(len(sequence.target_ids) for sequence in sequences)
    for tree in pack(sequences, max_tokens=budget):
        hidden = model.base_model(
            input_ids=tree.token_ids[None],
            position_ids=tree.position_ids[None],
            tree=tree.tree_mask(),
            use_cache=False,
        ).last_hidden_state[0]
        logprobs, _ = chosen_logprobs(
            hidden[tree.parents], model.lm_head.weight, tree.targets, temperature=TEMPERATURE
        )
        rows = tree.unpack(logprobs)
        (-(rows.sum(1) * advantages[list(tree.sequence_indices)]).sum() / num_tokens).backward()


def plain(
    model: PreTrainedModel, sequences: list[TrainSequence], advantages: torch.Tensor, rows_at_once: int = 2
) -> None:
    """Train with the same loss, but with the whole prompt before each completion.

    The head runs only on completion tokens.
    """
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    num_tokens = sum(len(sequence.target_ids) for sequence in sequences)
    for start in range(0, len(sequences), rows_at_once):
        batch = sequences[start : start + rows_at_once]
        ids, mask = left_padded(batch)
        length = len(batch[0].target_ids)
        hidden = model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        part = hidden[:, -length - 1 : -1].flatten(0, 1)
        logprobs, _ = chosen_logprobs(
            part, model.lm_head.weight, ids[:, -length:].flatten(), temperature=TEMPERATURE
        )
        weights = advantages[start : start + rows_at_once].repeat_interleave(length)
        (-(logprobs * weights).sum() / num_tokens).backward()


def left_padded(batch: list[TrainSequence]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(sequence.num_tokens for sequence in batch)
    ids, mask = (
        torch.zeros(len(batch), width, dtype=torch.int64),
        torch.zeros(len(batch), width, dtype=torch.int64),
    )
    for row, sequence in enumerate(batch):
        ids[row, width - sequence.num_tokens :] = torch.tensor(sequence.prompt_ids + sequence.target_ids)
        mask[row, width - sequence.num_tokens :] = 1
    return ids, mask


class TRLPath:
    """TRL's `_get_per_token_logps_and_entropies` and `_compute_loss`, on a trainer without a run.

    It uses a copy of the model with TRL's own head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from trl import GRPOTrainer
        from trl.trainer.utils import add_fused_lm_head

        self.model = LlamaForCausalLM(model.config)
        self.model.load_state_dict(model.state_dict())
        add_fused_lm_head(self.model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
        self.trainer = object.__new__(GRPOTrainer)
        self.trainer.__dict__ |= {
            "model": self.model, "temperature": TEMPERATURE,
            "args": SimpleNamespace(delta=None, steps_per_generation=1, report_to=[]),
            "accelerator": SimpleNamespace(
                num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True,
                autocast=nullcontext, is_main_process=True
            ),
            "_metrics": {"train": defaultdict(list)}, "aux_loss_enabled": False, "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None, "importance_sampling_level": "token", "beta": 0.0,
            "loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.2, "use_vllm": False,
            "vllm_importance_sampling_correction": False, "current_gradient_accumulation_steps": 1,
            "_entropy_bonus_enabled": False,
        }  # fmt: skip

    def __call__(
        self, sequences: list[TrainSequence], advantages: torch.Tensor, rows_at_once: int = 2
    ) -> None:
        self.model.zero_grad()
        num_tokens = torch.tensor(sum(len(sequence.target_ids) for sequence in sequences))
        for start in range(0, len(sequences), rows_at_once):
            batch = sequences[start : start + rows_at_once]
            ids, mask = left_padded(batch)
            length = len(batch[0].target_ids)
            with torch.no_grad():
                old = self.trainer._get_per_token_logps_and_entropies(self.model, ids, mask, length)[0]
            inputs = {
                "prompt_ids": ids[:, :-length], "prompt_mask": mask[:, :-length],
                "completion_ids": ids[:, -length:], "completion_mask": mask[:, -length:],
                "advantages": advantages[start : start + rows_at_once], "old_per_token_logps": old,
                "num_items_in_batch": num_tokens,
            }  # fmt: skip
            self.trainer._compute_loss(self.model, inputs).backward()


def flops(model: PreTrainedModel, sequences: list[TrainSequence], *, shared: bool) -> float:
    """Count the FLOPs of forward and backward of all sequences."""
    work = add_works(
        map(tree_work, pack(sequences, max_tokens=10**9)) if shared else map(sequence_work, sequences)
    )
    return train_flops(model_size(model), work)


def check_gradients(functions: dict[str, Callable[[], None]], models: dict[str, PreTrainedModel]) -> None:
    """Check that all paths compute the same gradient before they are timed."""
    gradients = {}
    for name, function in functions.items():
        function()
        gradients[name] = torch.cat([parameter.grad.flatten() for parameter in models[name].parameters()])
    for name, gradient in gradients.items():
        difference = ((gradient - gradients["plain"]).norm() / gradients["plain"].norm()).item()
        print(f"  relative difference of the gradients, {name} against plain: {difference:.1e}")
        if difference > 1e-4:
            raise SystemExit(f"{name} computes a different gradient from the plain step")


def measure(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """Measure all figures of one shape."""
    shape = f"p{args.prompt}-c{args.completion}-g{args.group}-k{args.positions}"
    print(f"--- {shape}", flush=True)
    sequences, advantages = make_rollouts(args)
    functions = {
        "ours": lambda: ours(model, sequences, advantages, args.budget),
        "plain": lambda: plain(model, sequences, advantages),
    }
    models = {"ours": model, "plain": model}
    if args.positions == 1 and importlib.util.find_spec("trl") is not None:
        trl = TRLPath(model)
        functions["trl"] = lambda: trl(sequences, advantages)
        models["trl"] = trl.model
    start = time.perf_counter()
    check_gradients(functions, models)
    repeats = args.repeats or (ROUNDS if time.perf_counter() - start < LONG_ROUND_S else FEWER_ROUNDS)
    if args.positions > 1:
        alone, _ = make_rollouts(args, share_document=False)
        functions["one position a document"] = lambda: ours(model, alone, advantages, args.budget)
        functions["one position a document"]()
    seconds = alternate(functions, repeats, warm_up=False)

    keep = not args.short
    shared = flops(model, sequences, shared=True)
    limit = flops(model, sequences, shared=False) / shared
    share = TARGET_SHARES.get(args.positions)
    store(
        f"train-step-vs-plain-{shape}", seconds["plain"] / seconds["ours"], limit=limit,
        target=share and share * limit, lower_is_better=False, keep=keep,
        unit="times as fast as the plain padded step", target_share_of_limit=share,
        ours_gflops_per_s=shared / seconds["ours"] / 1e9,
        plain_gflops_per_s=limit * shared / seconds["plain"] / 1e9,
    )  # fmt: skip
    if "trl" in seconds:
        # Besides the plain step's work, TRL runs one more forward pass, for the log-probs before the update.
        # That is 8 FLOPs for each weight and token instead of 6.
        store(
            f"train-step-vs-trl-{shape}", seconds["trl"] / seconds["ours"], limit=limit * 4 / 3,
            lower_is_better=False, keep=keep,
            target=TRL_TARGETS.get((args.prompt, args.completion, args.group)),
            unit="times as fast as TRL 1.16's path",
            trl_gflops_per_s=limit * 4 / 3 * shared / seconds["trl"] / 1e9,
        )  # fmt: skip
    if args.positions > 1:
        store(
            f"train-step-vs-one-position-{shape}", seconds["one position a document"] / seconds["ours"],
            target=1.0, lower_is_better=False, keep=keep, limit=flops(model, alone, shared=True) / shared,
            unit="times as fast per trained token as with one position per document",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompt", type=int, nargs="+", default=[256, 1024], help="tokens of the longest prompt"
    )
    parser.add_argument(
        "--completion", type=int, nargs="+", default=[24, 128], help="tokens of each completion"
    )
    parser.add_argument("--positions", type=int, nargs="+", default=[1, 4], help="positions in each document")
    parser.add_argument("--group", type=int, default=8, help="completions for each position")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a packed tree")
    parser.add_argument(
        "--repeats",
        type=int,
        help=f"rounds; by default {ROUNDS}, or {FEWER_ROUNDS} if one takes longer than {LONG_ROUND_S:.0f} s "
        "(the record says so)",
    )
    parser.add_argument(
        "--short", action="store_true", help="run a tiny model and shape for a few seconds, store nothing"
    )
    args = parser.parse_args()
    if args.short:
        args.prompt, args.completion, args.group, args.repeats = [96], [8], 4, 1
    if importlib.util.find_spec("trl") is None:
        print("trl is not installed, so it is not measured")
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if args.short else SMOLLM2_135M), attn_implementation="sdpa")
    model = LlamaForCausalLM(config).train()
    for prompt, completion, positions in itertools.product(args.prompt, args.completion, args.positions):
        shape = {
            "prompt": prompt,
            "completion": completion,
            "positions": positions,
            "vocabulary": config.vocab_size,
        }
        measure(model, argparse.Namespace(**(vars(args) | shape)))


if __name__ == "__main__":
    main()
