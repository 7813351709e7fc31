"""The batch arithmetic in words: what one step of a config does, printed before the run starts."""

from __future__ import annotations


def batch_arithmetic(
    *,
    tasks_per_step: int,
    positions_per_document: int,
    group_size: int,
    max_completion_tokens: int,
    micro_batch_tokens: int,
    optimizer_steps_per_batch: int,
    max_steps: int,
    world_size: int,
    pilot_size: int | None = None,
    max_staleness: int = 0,
) -> str:
    """A short text that users can check against what they intended.

    >>> print(batch_arithmetic(  # doctest: +NORMALIZE_WHITESPACE
    ...     tasks_per_step=32, positions_per_document=4, group_size=8, max_completion_tokens=32,
    ...     micro_batch_tokens=1024, optimizer_steps_per_batch=1, max_steps=30, world_size=1))
    a step: 32 contexts (4 from each of 8 documents) x 8 = 256 completions of at most 32 tokens
        = at most 8,192 sampled tokens
    trained: in micro-batches of at most 1,024 tokens on 1 rank (32 contexts each);
        1 optimizer step a batch (exactly on-policy)
    the run: 30 optimizer steps = 30 batches = 960 contexts, 7,680 completions
    """
    documents = tasks_per_step // positions_per_document
    completions = tasks_per_step * group_size
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    if optimizer_steps_per_batch == 1:
        updates = "1 optimizer step a batch" + ("" if max_staleness else " (exactly on-policy)")
    else:
        updates = (
            f"{optimizer_steps_per_batch} optimizer steps a batch, "
            f"of {tasks_per_step // optimizer_steps_per_batch} contexts each"
        )
    lines = [
        f"a step: {tasks_per_step:,} contexts ({positions_per_document} from each of {documents:,} "
        f"documents) x {group_size} = {completions:,} completions of at most {max_completion_tokens:,} "
        f"tokens = at most {completions * max_completion_tokens:,} sampled tokens",
        f"trained: in micro-batches of at most {micro_batch_tokens:,} tokens on {ranks} "
        f"({tasks_per_step // world_size:,} contexts each); {updates}",
    ]
    if pilot_size is not None:
        lines.append(
            f"pilot: {pilot_size} completions of each context first, "
            f"the other {group_size - pilot_size} only if their rewards differ"
        )
    if max_staleness:
        lines.append(
            "asynchronous: generated while the policy trains, "
            f"by weights at most {max_staleness} optimizer steps old"
        )
    if max_steps > 0:
        batches = max_steps // optimizer_steps_per_batch
        lines.append(
            f"the run: {max_steps:,} optimizer steps = {batches:,} batches "
            f"= {batches * tasks_per_step:,} contexts, {batches * completions:,} completions"
        )
    return "\n".join(lines)
