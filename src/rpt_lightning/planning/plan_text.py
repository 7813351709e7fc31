"""Format a plan as plain text for a terminal with 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.planning.bottlenecks import first_limit
from rpt_lightning.planning.host_memory import PROCESS_BYTES, offloaded_bytes, offloaded_moment_bytes
from rpt_lightning.planning.plan import MemoryFit, Plan
from rpt_lightning.planning.text_layout import INDENT, bullets, gb, table, wrap
from rpt_lightning.training.batch_summary import batch_arithmetic

_GB = 1e9
_COLUMNS = {"single": "one device", "ddp": "DDP", "fsdp2": "FSDP2"}


def report(plan: Plan, *, assumptions: Sequence[str]) -> str:
    """Format all sections, with the first bottleneck last.

    ``assumptions`` say where the numbers of the step come from.
    """
    sections = [
        ("The step", _arithmetic(plan)),
        ("Assumptions", bullets(assumptions)),
        ("Tokens per step", _tokens(plan)),
        (
            f"Memory per device, in GB of 10^9 bytes ({plan.device.name}: "
            f"{plan.device.memory_bytes / _GB:.0f})",
            _memory(plan),
        ),
        ("Operations per step", _flops(plan)),
        (f"Time per step ({_devices(plan)}, nothing overlaps; an estimate)", _times(plan)),
        *_alternatives(plan),
        ("The limit", wrap(first_limit(plan))),
    ]
    return "\n\n".join("\n".join([title, *(INDENT + line for line in lines)]) for title, lines in sections)


def _alternatives(plan: Plan) -> list[tuple[str, list[str]]]:
    """Return the section on other arrangements, if there are any that fit."""
    if not plan.alternatives:
        return []
    rows = [["", "engine's share", "GB", "sequences", "seconds a step"]]
    rows += [
        [
            f"{other.offload}, engine {'asleep' if other.sleeps else 'awake'}",
            f"{other.share:.2f}",
            gb(other.total_bytes).strip(),
            f"{other.concurrent_sequences:,.0f}",
            f"{other.step_s:.3g}",
        ]
        for other in plan.alternatives
    ]
    title = f"What fits on {_devices(plan)} with a margin of a tenth, with FSDP2"
    notes = [
        "flags: --model.offload_moments, --trainer.strategy.cpu_offload, --rollout.engine.sleep_in_training "
        "and, for the share, --rollout.engine.gpu_memory_utilization; falling asleep and waking are not timed"
    ]
    return [(title, [*table(rows), *bullets(notes)])]


def _devices(plan: Plan) -> str:
    if not plan.settings.num_servers:
        return f"{plan.settings.num_ranks:,} x {plan.device.name}"
    return f"{plan.settings.num_ranks:,} x {plan.device.name} train, {plan.settings.num_servers:,} generate"


def _arithmetic(plan: Plan) -> list[str]:
    settings, shape = plan.settings, plan.shape
    text = batch_arithmetic(
        tasks_per_step=settings.tasks_per_step,
        positions_per_document=settings.positions_per_document,
        group_size=settings.group_size,
        max_completion_tokens=settings.max_completion_tokens,
        micro_batch_tokens=settings.micro_batch_tokens,
        optimizer_steps_per_batch=settings.optimizer_steps_per_batch,
        max_steps=settings.max_steps,
        world_size=settings.num_ranks,
    )
    model = (
        f"the model: {shape.family}, {shape.num_params:,} parameters, of which "
        f"{shape.body_params - shape.adapter_params:,} in "
        f"{shape.num_layers} layers; {'tied' if shape.is_tied else 'untied'} head, "
        f"vocabulary {shape.vocab_size:,}"
    )
    adapter = (
        [
            f"the adapter: rank {shape.adapter_rank} on {shape.adapter_targets} matrices of a layer, "
            f"{shape.adapter_params:,} parameters; {shape.bf16_params:,} of the frozen ones are held in bf16"
        ]
        if shape.has_adapter
        else []
    )
    return bullets([*text.splitlines(), model, *adapter])


def _tokens(plan: Plan) -> list[str]:
    tokens = plan.tokens
    rows: list[list[str]] = [["", "tokens", "scored", "pairs"]]
    for name, part in (
        ("trained, prefixes shared", tokens.packed),
        ("trained, each completion alone", tokens.plain),
    ):
        rows.append([name, f"{part.tokens:,}", f"{part.scored_tokens:,}", f"{part.pairs:.2e}"])
    rows.append(
        [
            "alone / shared",
            *(
                f"{alone / shared:.2f}"
                for alone, shared in zip(
                    vars(tokens.plain).values(), vars(tokens.packed).values(), strict=True
                )
            ),
        ]
    )
    sampled = tokens.num_completions * tokens.completion_tokens
    return [
        *table(rows),
        *bullets(
            [
                f"generated: {sampled:,.0f} tokens; prompts read: {tokens.prefill.tokens:,} tokens, or "
                f"{tokens.prefill_alone.tokens:,} without a prefix cache",
                f"micro-batches: {tokens.micro_batches:,} on the busiest rank, which trains "
                f"{tokens.busiest.tokens:,} tokens",
            ]
        ),
    ]


def _memory(plan: Plan) -> list[str]:
    labels = {
        "weights_bytes": "weights, fp32 and bf16" if plan.shape.bf16_params else "weights, fp32",
        "gradients_bytes": "gradients, fp32",
        "optimizer_bytes": "optimizer",
        "buckets_bytes": "DDP's buckets",
        "cast_weights_bytes": "autocast's bf16 copy of the weights",
        "gathered_bytes": "gathered and being scattered",
        "activations_bytes": "activations"
        + (", layers recomputed" if plan.settings.checkpointing else ", all layers kept"),
        "masks_bytes": "attention masks",
        "work_bytes": "temporary, in a layer, head or optimizer",
    }
    fits = plan.memory
    rows = [
        [
            "",
            *(
                _COLUMNS[fit.strategy] + (" *" if fit.strategy == plan.settings.strategy else "  ")
                for fit in fits
            ),
        ]
    ]
    rows += [[label, *(gb(getattr(fit.training, name)) for fit in fits)] for name, label in labels.items()]
    if not plan.settings.num_servers:
        rows.append(["engine: weights", *(gb(fit.engine.weights_bytes) for fit in fits)])
        rows.append(
            [
                "engine: KV cache and workspace",
                *(gb(max(0.0, fit.engine.kv_cache_bytes) + fit.engine.workspace_bytes) for fit in fits),
            ]
        )
    rows.append(["context, allocator", *(gb(fit.overhead_bytes) for fit in fits)])
    rows.append(
        [
            "peak, taking turns" if plan.settings.engine_sleeps else "total",
            *(gb(fit.total_bytes) for fit in fits),
        ]
    )
    rows.append(["does it fit?", *(_verdict(fit) for fit in fits)])
    other = "without" if plan.settings.checkpointing else "with"
    rows.append([f"{other} activation checkpointing", *(gb(fit.total_bytes) for fit in plan.memory_other)])
    rows.append(["does it fit?", *(_verdict(fit) for fit in plan.memory_other)])
    return [
        *table(rows),
        *bullets(
            [
                "* as configured; with the largest micro-batch, of "
                f"{plan.settings.largest_micro_batch:,} tokens, after weights, gradients and optimizer exist",
                f"the engine decodes {plan.concurrent_sequences:,.0f} sequences at a time on a device"
                if plan.fit.engine_starts
                else "the engine does not start",
                *_elsewhere(plan),
            ]
        ),
    ]


def _elsewhere(plan: Plan) -> list[str]:
    """Describe the memory outside the training devices."""
    lines = []
    if plan.settings.num_servers:
        engine = plan.fit.engine
        lines.append(
            f"a server holds {engine.weights_bytes / _GB:.2f} GB of weights and "
            f"{max(0.0, engine.kv_cache_bytes) / _GB:.2f} GB of cached keys and values"
        )
    if plan.settings.cpu_offload:
        offloaded = offloaded_bytes(
            plan.shape,
            num_ranks=plan.settings.num_ranks,
            optimizer_bytes_per_param=plan.settings.optimizer_bytes_per_param,
        )
        lines.append(
            f"weights, gradients and optimizer are in host memory: {offloaded / _GB:,.2f} GB per device, in "
            f"pinned blocks of powers of two, and about {PROCESS_BYTES / _GB:.0f} GB for its process"
        )
    if plan.settings.offload_moments:
        moments = offloaded_moment_bytes(
            plan.shape,
            num_shards=plan.settings.num_ranks if plan.settings.strategy == "fsdp2" else 1,
            optimizer_bytes_per_param=plan.settings.optimizer_bytes_per_param,
        )
        lines.append(
            f"between steps the optimizer's moments are in host memory: {moments / _GB:,.2f} GB per device, "
            f"in pinned blocks of powers of two, and about {PROCESS_BYTES / _GB:.0f} GB for its process"
        )
    return lines


def _verdict(fit: MemoryFit) -> str:
    return "yes  " if fit.fits else "NO  "


def _flops(plan: Plan) -> list[str]:
    flops = plan.flops
    total = flops.train_shared_flops + flops.prefill_flops + flops.decode_flops
    rows = [["", "operations", "of the step"]]
    for name, value in (
        ("training, prefixes shared", flops.train_shared_flops),
        ("generation: prompts", flops.prefill_flops),
        ("generation: sampled tokens", flops.decode_flops),
    ):
        rows.append([name, f"{value:.2e}", f"{value / total:.0%}"])
    return [
        *table(rows),
        f"training without sharing: {flops.train_plain_flops:.2e}, "
        f"{flops.train_plain_flops / flops.train_shared_flops:.2f} times as many",
    ]


def _times(plan: Plan) -> list[str]:
    times = plan.times
    if not plan.fit.engine_starts:
        return wrap(
            f"No times, because the engine does not start. Training alone would take {times.train_s:.3g} s."
        )
    rows = [["", "seconds", "of the step"]]
    for name, value in (
        ("generation: prompts", times.prefill_s),
        ("generation: decoding", times.decode_s),
        ("training", times.train_s),
        ("weight sync", times.sync_s),
        ("total", times.step_s),
    ):
        rows.append([name, f"{value:.3g}", f"{value / times.step_s:.0%}"])
    hours = times.step_s * plan.settings.max_steps / plan.settings.optimizer_steps_per_batch / 3600
    notes = [
        f"training computes for {times.train_compute_s:.3g} s and sends for {times.train_network_s:.3g} s at "
        "the same time"
        + (
            f"; {times.offload_s:.3g} s more for transfers and optimizer on the host"
            if plan.settings.cpu_offload
            else f"; {times.offload_s:.3g} s more to move the moments to the device and back"
            if plan.settings.offload_moments
            else ""
        ),
        f"a training device sends {plan.traffic.train_bytes / _GB:,.0f} GB in a step, and "
        f"{plan.traffic.gather_bytes / _GB:,.0f} GB for the weight sync"
        + (
            f"; a server receives {plan.traffic.server_bytes / _GB:,.1f} GB"
            if plan.settings.num_servers
            else ""
        ),
        f"one completion at the limit of {plan.settings.max_completion_tokens:,} tokens decodes for at least "
        f"{times.longest_decode_s:.3g} s, however many devices there are",
    ]
    if plan.settings.num_servers:
        notes.append(
            "if the next rollouts were generated while the policy trains, a step would take "
            f"{times.overlapped_s:.3g} s"
        )
    if plan.settings.max_steps > 0:
        notes.append(
            f"{plan.settings.max_steps:,} steps: {hours:,.1f} hours, without validation and checkpoints"
        )
    return [*table(rows), *bullets(notes)]
