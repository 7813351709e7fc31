"""What a plan assumes, in words. Each assumption names the flag that changes it, if there is one."""

from __future__ import annotations

from collections.abc import Iterator

from rpt_lightning.planning.devices import (
    DEVICES_PER_NODE,
    DIGEST_BYTES_PER_S,
    HOST_BANDWIDTH_BYTES_PER_S,
    NEW_MEMORY_BYTES_PER_S,
    NODE_LINK_BYTES_PER_S,
    Device,
)
from rpt_lightning.planning.plan import Plan
from rpt_lightning.planning.settings import Rates, RunSettings
from rpt_lightning.planning.times import received_frac


def assumptions(plan: Plan, *, live_frac: float, replaces_groups: bool) -> Iterator[str]:
    """Yield the assumptions of a plan.

    Args:
        plan: The plan.
        live_frac: Assumed fraction of groups whose rewards differ.
        replaces_groups: Whether the run uses dynamic sampling.
    """
    yield from _step(plan, live_frac=live_frac, replaces_groups=replaces_groups)
    yield from _precision(plan.settings)
    if plan.settings.num_servers:
        yield from _servers(plan.settings, plan.device, plan.rates)
    if plan.settings.engine_sleeps:
        yield "the engine sleeps while the policy trains, so they take turns using memory"
    yield from _offload(plan.settings, plan.device)


def _step(plan: Plan, *, live_frac: float, replaces_groups: bool) -> Iterator[str]:
    device, rates = plan.device, plan.rates
    yield (
        f"completions: {plan.tokens.completion_tokens:,} tokens each (--plan.completion_tokens), "
        "without common beginnings"
    )
    not_counted = "; extra groups from dynamic sampling are not counted" if replaces_groups else ""
    yield f"groups with unequal rewards, which are trained: {live_frac:.0%} (--plan.live_frac){not_counted}"
    yield (
        f"training and prefill reach {rates.mfu:.0%} of {device.peak_flops / 1e12:,.3g} TFLOP/s "
        f"(--plan.mfu), decoding {rates.bandwidth_frac:.0%} of "
        f"{device.bandwidth_bytes_per_s / 1e12:,.3g} TB/s (--plan.bandwidth_frac); "
        "nothing waits for the longest completion"
    )
    if plan.settings.trains_contexts:
        yield (
            "model.ntp_weight trains every position of the step's prompts once, and no text behind the last "
            "position of a document (model.ntp_whole_documents)"
        )


def _precision(settings: RunSettings) -> Iterator[str]:
    if settings.is_mixed and settings.gathers_bf16:
        yield (
            "FSDP2 gathers and computes the layers in bf16 (shards stay fp32), "
            "so autocast makes no copy of the weights"
        )
    elif settings.is_mixed:
        yield (
            "FSDP2 gathers the weights in fp32, and autocast casts them "
            "(with checkpointing a layer at a time)"
        )


def _servers(settings: RunSettings, device: Device, rates: Rates) -> Iterator[str]:
    yield (
        f"a server is one device, whose vLLM takes {settings.gpu_memory_utilization:.0%} of it and "
        f"generates at most {settings.max_num_seqs:,} completions at a time"
    )
    if settings.transport == "nccl":
        yield (
            f"weights reach the servers by one broadcast at {NODE_LINK_BYTES_PER_S / 1e9:.0f} GB/s "
            "(NCCLTransport)"
        )
        return
    yield (
        f"weights reach the servers through a folder, {_published(settings, rates)} once and read "
        f"once by every node of {DEVICES_PER_NODE} servers, at "
        f"{rates.storage_bytes_per_s / 1e9:g} GB/s in all (SharedFolderTransport, "
        "--plan.shared_storage_gb_per_s); before and after, all weights cross from device to host or "
        f"back at {device.host_link_bytes_per_s / 1e9:.0f} GB/s, and their digests are computed at "
        f"{DIGEST_BYTES_PER_S / 1e9:.0f}"
    )


def _published(settings: RunSettings, rates: Rates) -> str:
    """Describe what a SharedFolderTransport writes for each version."""
    if received_frac(settings, rates) == 1:
        return "written"
    return (
        f"all of them every {settings.full_every} versions for servers that come late, and in every version "
        f"what changed ({rates.changed_frac:.1%} of the weights, --plan.changed_frac), written"
    )


def _offload(settings: RunSettings, device: Device) -> Iterator[str]:
    link = f"{device.host_link_bytes_per_s / 1e9:.0f} GB/s"
    if settings.offload_moments:
        yield (
            f"the optimizer's moments travel between host and device at {link}, with nothing else at the "
            "same time"
        )
    if settings.cpu_offload:
        unfused = "" if settings.is_fused else " (unfused optimizer: an eighth of that)"
        yield (
            f"weights and gradients move between host and device at {link}, without overlap, and "
            f"gradients after the first micro-batch at {NEW_MEMORY_BYTES_PER_S / 1e9:.0f}; the host "
            f"adds and steps at {HOST_BANDWIDTH_BYTES_PER_S / 1e9:.0f} GB/s of memory per device{unfused}"
        )
