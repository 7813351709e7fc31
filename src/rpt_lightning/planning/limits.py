"""Where a run's limit lies, in a sentence, and what would move it."""

from __future__ import annotations

from rpt_lightning.planning.plan import MemoryFit, Plan

GB = 1e9


def first_limit(plan: Plan) -> str:
    """The first bottleneck: memory where the run does not fit, else the longest phase of a step."""
    if not plan.fit.fits:
        return _memory_limit(plan)
    times = plan.times
    phases = {"generation": times.generation_s, "training": times.train_s, "the sync of the weights": times.sync_s}
    longest = max(phases, key=lambda name: phases[name])
    why, relief = {"generation": _generation, "training": _training, "the sync of the weights": _sync}[longest](plan)
    sentence = f"The first bottleneck is {longest}: {phases[longest] / times.step_s:.0%} of the step, {why}. What would relieve it: {relief}."
    idle = plan.settings.num_ranks - plan.tokens.busy_ranks
    if idle > 0:
        sentence += f" {idle:,} of {plan.settings.num_ranks:,} ranks have nothing to train: a step of this many tasks is too small for so many devices."
    return sentence


def _memory_limit(plan: Plan) -> str:
    fit, engine = plan.fit, plan.fit.engine
    if engine.kv_cache_bytes <= 0:
        return (
            f"The first bottleneck is memory: the engine's weights ({engine.weights_bytes / GB:.1f} GB) leave no room for a cache in its share of the device. "
            "What would relieve it: a larger rollout.engine.gpu_memory_utilization, or a device with more memory."
        )
    parts = {name.removesuffix("_bytes").replace("_", " "): size for name, size in vars(fit.training).items()}
    parts["engine"] = engine.total_bytes
    largest = max(parts, key=lambda name: parts[name])
    other = next((f"the strategy {_NAMES[other.strategy]}" for other in plan.memory if other.fits and other is not fit), None)
    switched = plan.memory_other[plan.memory.index(fit)]
    options = [
        *([other] if other else []),
        *(["policy.activation_checkpointing"] if switched.fits and not plan.settings.checkpointing else []),
        *(["a smaller model.micro_batch_tokens"] if _micro_batch_bytes(fit) > 0.2 * fit.device_bytes and _can_be_cut(plan) else []),
        *(["a shorter rollout.max_completion_tokens"] if _micro_batch_bytes(fit) > 0.2 * fit.device_bytes and not _can_be_cut(plan) else []),
        "more devices under FSDP2" if fit.strategy == "fsdp2" or not other else "a device with more memory",
    ]
    return (
        f"The first bottleneck is memory: {fit.total_bytes / GB:.0f} GB are needed on a device that has {fit.device_bytes / GB:.0f} GB, and the largest part is "
        f"{largest} ({parts[largest] / GB:.0f} GB). What would relieve it: {', or '.join(options)}."
    )


_NAMES = {"single": "single", "ddp": "DDP", "fsdp2": "FSDP2"}


def _micro_batch_bytes(fit: MemoryFit) -> float:
    return fit.training.activations_bytes + fit.training.masks_bytes


def _can_be_cut(plan: Plan) -> bool:
    """One long sequence stays whole, however small the budget."""
    return plan.settings.largest_micro_batch == plan.settings.micro_batch_tokens


def _generation(plan: Plan) -> tuple[str, str]:
    times = plan.times
    if times.prefill_s > times.decode_s:
        return "most of it to read prompts", "several positions a document with prefix caching, or shorter contexts"
    if plan.concurrent_sequences < plan.tokens.busiest_completions and times.decode_cache_frac < 0.5:
        return (
            f"where each pass reads the weights for only {plan.concurrent_sequences:,.0f} sequences at a time",
            "more sequences at once (rollout.engine.max_num_seqs, room for the cache), or shorter completions",
        )
    read = "cached keys and values" if times.decode_cache_frac >= 0.5 else "weights"
    return f"where most of what decoding reads is {read}", "shorter completions, or more devices for the same step"


def _training(plan: Plan) -> tuple[str, str]:
    if plan.times.train_network_s > plan.times.train_compute_s:
        return "which waits for the network", "fewer and larger micro-batches (model.micro_batch_tokens), or a faster network"
    recompute = ", a quarter of it to compute activations again" if plan.settings.checkpointing else ""
    return (
        f"by the policy's operations{recompute}",
        "several positions a document (data.positions_per_document), larger micro-batches (fewer groups are cut), or more devices",
    )


def _sync(plan: Plan) -> tuple[str, str]:
    return "to hand the weights over", "more tasks a step"
