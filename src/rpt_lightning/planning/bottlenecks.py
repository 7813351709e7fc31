"""Describe where a run's limit lies and what would move it."""

from __future__ import annotations

from rpt_lightning.planning.plan import Plan
from rpt_lightning.planning.times import busiest_completions

GB = 1e9


def first_limit(plan: Plan) -> str:
    """Describe the first bottleneck.

    It is memory if the run does not fit, and otherwise the longest phase of a step.
    """
    if not plan.fit.fits:
        return _memory_limit(plan)
    times = plan.times
    phases = {
        "generation": times.generation_s,
        "training": times.train_s,
        "the weight sync": times.sync_s,
    }
    longest = max(phases, key=lambda name: phases[name])
    why, relief = {"generation": _generation, "training": _training, "the weight sync": _sync}[longest](plan)
    sentence = (
        f"The first bottleneck is {longest}: {phases[longest] / times.step_s:.0%} of the step, {why}. "
        f"What would relieve it: {relief}."
    )
    idle = plan.settings.num_ranks - plan.tokens.busy_ranks
    if idle > 0:
        sentence += (
            f" {idle:,} of {plan.settings.num_ranks:,} ranks have nothing to train: a step with this many "
            "tasks is too small for so many devices."
        )
    if times.longest_decode_s > times.decode_s:
        sentence += (
            f" A single completion of the maximum length decodes for {times.longest_decode_s:.3g} s, longer "
            "than the whole decoding of this step. If one occurs, all the others wait for it."
        )
    idle_servers = plan.settings.num_servers - plan.tokens.num_prompts
    if idle_servers > 0:
        sentence += f" {idle_servers:,} of {plan.settings.num_servers:,} servers have nothing to generate."
    return sentence


def bottleneck(plan: Plan) -> str:
    """Name the bottleneck in a few words, for a table."""
    if not plan.fit.fits:
        return "memory"
    times = plan.times
    phases = {
        "reading prompts": times.prefill_s,
        f"decoding, {plan.concurrent_sequences:,.0f} at a time": times.decode_s,
        "training, computing": times.train_compute_s,
        "training, network": times.train_network_s,
        "training, host": times.offload_s,
        "weight sync": times.sync_s,
    }
    return max(phases, key=lambda name: phases[name])


def _memory_limit(plan: Plan) -> str:
    fit = plan.fit
    if not fit.engine_starts:
        room = max(0.0, fit.engine.kv_cache_bytes)
        engine = (
            f"the engine does not start: its share of the device holds its weights "
            f"({fit.engine.weights_bytes / GB:.1f} GB) and {room / GB:.1f} GB of cached keys and values, "
            f"less than the {fit.sequence_cache_bytes / GB:.1f} GB of one sequence of the maximum length"
        )
        if fit.total_bytes <= fit.device_bytes:
            return f"The first bottleneck is memory: {engine}. What would relieve it: {_engine_relief(plan)}."
        return f"{_overflow(plan)} In addition, {engine}."
    return _overflow(plan)


def _overflow(plan: Plan) -> str:
    fit = plan.fit
    parts = {name: getattr(fit.training, f"{field}_bytes") for field, name in _PARTS.items()}
    parts["the engine"] = 0.0 if fit.is_apart else fit.engine.total_bytes
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    named = ", ".join(f"{name} ({parts[name] / GB:.0f} GB)" for name in largest)
    return (
        f"The first bottleneck is memory: {fit.total_bytes / GB:.0f} GB are needed on a device that has "
        f"{fit.device_bytes / GB:.0f} GB; the largest parts are {named}. "
        f"What would relieve it: {'; '.join(_memory_relief(plan))}."
    )


def _memory_relief(plan: Plan) -> list[str]:
    """List what would make the run fit or, if no single change does, what would help."""
    fit = plan.fit
    fitting = [f"the strategy {_NAMES[other.strategy]}" for other in plan.memory if other.fits]
    other = plan.memory_other[plan.memory.index(fit)]
    if other.fits:
        fitting.append("activation checkpointing (model.policy.activation_checkpointing)")
    if fitting:
        return fitting
    helping = []
    if fit.strategy != "fsdp2" and plan.settings.num_devices > 1:
        helping.append("FSDP2 (configs/strategy/fsdp2.yaml)")
    if other.total_bytes < fit.total_bytes:
        helping.append("activation checkpointing (model.policy.activation_checkpointing)")
    if fit.training.activations_bytes + fit.training.work_bytes > 0.1 * fit.device_bytes:
        longest_counts = (
            plan.settings.micro_batch_tokens <= plan.settings.longest_sequence
        )  # the longest sequence stays whole, however small the budget
        helping.append(
            "a shorter rollout.sampling.max_completion_tokens"
            if longest_counts
            else "a smaller model.micro_batch_tokens"
        )
    if not fit.is_apart and fit.engine.total_bytes > 0.1 * fit.device_bytes:
        helping.append("separate devices for the engine")
    return [*helping, "more devices" if fit.strategy == "fsdp2" else "devices with more memory"]


def _engine_relief(plan: Plan) -> str:
    if plan.settings.engine == "servers":
        return (
            "servers with more memory, or a larger --plan.gpu_memory_utilization "
            "(and serve.gpu_memory_utilization)"
        )
    if plan.settings.engine == "vllm" and plan.settings.on_gpu:
        return "a larger rollout.engine.gpu_memory_utilization"
    return (
        "a larger rollout.engine.kv_cache_gib"
        if plan.settings.engine == "vllm"
        else "a larger rollout.engine.max_batch_tokens"
    )


_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "the optimizer",
    "buckets": "DDP's buckets",
    "cast_weights": "autocast's copy of the weights",
    "gathered": "what FSDP2 has gathered",
    "activations": "activations",
    "masks": "attention masks",
    "work": "temporary memory of a layer, the head or the optimizer",
}
_NAMES = {"single": "single", "ddp": "DDP", "fsdp2": "FSDP2"}


def _generation(plan: Plan) -> tuple[str, str]:
    times = plan.times
    if times.prefill_s > times.decode_s:
        return (
            "most of it spent on reading prompts",
            "several positions in each document with prefix caching, or shorter contexts",
        )
    if (
        plan.concurrent_sequences < busiest_completions(plan.settings, plan.tokens)
        and times.decode_cache_frac < 0.5
    ):
        return (
            "where each pass reads the weights for only "
            f"{plan.concurrent_sequences:,.0f} sequences at a time",
            "more sequences at once (rollout.engine.max_num_seqs, room for the cache), or shorter "
            "completions",
        )
    read = "cached keys and values" if times.decode_cache_frac >= 0.5 else "weights"
    more = "more servers" if plan.settings.num_servers else "more devices for the same step"
    return f"where decoding mostly reads {read}", f"shorter completions, or {more}"


def _training(plan: Plan) -> tuple[str, str]:
    if plan.times.offload_s > max(plan.times.train_network_s, plan.times.train_compute_s):
        return (
            "most of it spent on transfers and the optimizer on the host",
            "no CPU offload, or fewer and larger micro-batches (model.micro_batch_tokens)",
        )
    if plan.times.train_network_s > plan.times.train_compute_s:
        return (
            "which waits for the network",
            "fewer and larger micro-batches (model.micro_batch_tokens), or a faster network",
        )
    recompute = ", including activations that are recomputed" if plan.settings.checkpointing else ""
    return (
        f"spent on the policy's operations{recompute}",
        "several positions in each document (data.positions_per_document), larger micro-batches (fewer "
        "groups are cut), or more devices",
    )


def _sync(plan: Plan) -> tuple[str, str]:
    if plan.settings.num_servers and plan.settings.transport == "folder":
        return (
            "spent on sending the weights through a folder",
            "NCCLTransport, faster storage, or more tasks in each step",
        )
    return "spent on sending the weights", "more tasks in each step"
