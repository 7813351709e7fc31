"""The fixed held-out positions of a validation."""

from __future__ import annotations

import numpy as np

from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.types import TokenTask


def choose_heldout(
    folder: TaskFolder, *, num_tasks: int, min_entropy: float, seed: int
) -> tuple[TokenTask, ...]:
    """Choose ``num_tasks`` held-out positions with more entropy than ``min_entropy`` (nats).

    The positions are spread over the documents as evenly as their numbers allow. They depend on the seed and
    the folder alone. They are ordered by document and position, so that prompts share prefixes. If the folder
    has fewer positions, all are returned. Raises ValueError if it has none. Positions without an admissible
    answer are included: they count as wrong and lower the ceiling.
    """
    rng = np.random.default_rng(seed)
    ranked: list[tuple[int, int, int, int]] = []  # (round, place of the document, document, k)
    for place, document in enumerate(rng.permutation(len(folder)).tolist()):
        eligible = np.flatnonzero(folder.document(document)["entropy"] > min_entropy)
        ranked += [(turn, place, document, int(k)) for turn, k in enumerate(rng.permutation(eligible))]
    if not ranked:
        raise ValueError(
            f"--data.eval_min_entropy {min_entropy}: {folder.path} holds no held-out position "
            "with more entropy; lower it"
        )
    chosen = sorted((document, k) for _, _, document, k in sorted(ranked)[:num_tasks])
    return tuple(folder.task(document, k) for document, k in chosen)
