"""Every parameter that a command line shows has a text of its own there."""

from __future__ import annotations

import inspect

import pytest
from docstring_parser import parse

import rpt_lightning
from rpt_lightning.cli import run as lightning_cli
from rpt_lightning.data.modules.worked_examples import Phase
from rpt_lightning.policy.model import Policy

CALLBACKS = (
    "RolloutCallback",
    "RunCheckpoint",
    "StopRun",
    "RankWatch",
    "RolloutSamples",
    "Health",
    "Budget",
    "MachineStats",
)
CLASSES = {
    cls.__name__: cls
    for cls in (
        *lightning_cli.PARTS,
        *(getattr(lightning_cli, name) for name in CALLBACKS),
        *filter(inspect.isclass, (getattr(rpt_lightning, name) for name in rpt_lightning.__all__)),
        Policy,
        Phase,
    )
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_parameter_of_a_class_is_explained(name: str) -> None:
    """jsonargparse reads an ``Args:`` section only if its parameters are indented below it."""
    cls = CLASSES[name]
    explained = {
        parameter.arg_name
        for base in cls.__mro__
        for text in (base.__doc__, base.__dict__.get("__init__") and base.__init__.__doc__)
        if text and base is not object
        for parameter in parse(text).params
        if parameter.description
    }
    asked = set(inspect.signature(cls).parameters) - {"args", "kwargs"}
    missing = asked - explained
    assert not missing, f"{name} does not explain {sorted(missing)}"
