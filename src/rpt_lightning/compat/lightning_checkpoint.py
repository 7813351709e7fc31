"""The layout of the checkpoints that Lightning writes. Tested with lightning 2.6.6.

It does not import lightning, because `rpt export` reads checkpoints without it.
"""

from __future__ import annotations

import copy
from typing import Any

# A sharded strategy writes a folder. This file holds everything except the weights and the optimizer's state.
SHARDED_REST = "meta.pt"
# The prefix of a weight's name among the shards.
SHARDED_WEIGHTS = "state_dict."


def place_of(trainer: Any) -> dict[str, Any]:
    """Copy the entries that a checkpoint would now hold about the place of the run and of its data.

    Relies on ``fit_loop.state_dict()`` and on the names of these entries: ``epoch``, ``loops`` with
    ``fit_loop``, and the qualified name of the data module's class.
    """
    place = {
        "epoch": trainer.current_epoch,
        "loops": {"fit_loop": copy.deepcopy(trainer.fit_loop.state_dict())},
    }
    data = trainer.datamodule
    if data is not None and (state := data.state_dict()):
        place[type(data).__qualname__] = copy.deepcopy(state)
    return place


def set_place(checkpoint: dict[str, Any], place: dict[str, Any]) -> None:
    """Replace the entries of a checkpoint by those that `place_of` returned. Other loops keep theirs."""
    loops = checkpoint["loops"] | place["loops"]
    checkpoint.update(place | {"loops": loops})
