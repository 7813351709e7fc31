"""Assemble template, style and script into one HTML file that loads nothing.

A content security policy forbids every request and every script except ours, which it names by their
hashes. Recorded content is always treated as text. Jinja escapes it in the template, the script sets it with
textContent, and JSON inside a script element has its `<` escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files

from rpt_lightning import __version__
from rpt_lightning.evaluation.report.plotly_parts import Figure, colour
from rpt_lightning.evaluation.report.rollout_data import compress
from rpt_lightning.evaluation.report.tables import Table
from rpt_lightning.evaluation.report.verdict import Statement
from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.evaluation.tables.stages import INTERVAL_NOTE

# The files become one script element. Each file uses what the earlier ones define.
_SCRIPTS = ("app.js", "figures.js", "rollout_view.js", "rollouts.js")


@dataclass(frozen=True, kw_only=True)
class RolloutBlock:
    """The compressed rollouts of one step of a run.

    ``has_tokens`` is False for files of earlier versions, which hold only texts.
    """

    run: int
    step: int
    num_rollouts: int
    has_tokens: bool
    data: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything that the template shows."""

    runs: Sequence[Run]
    verdicts: dict[str, list[Statement]]
    difficulty_tables: Sequence[Table]
    field_tables: Sequence[Table]
    run_table: Table
    pattern_tables: Sequence[Table]
    figures: Sequence[Figure]
    rollouts: Sequence[RolloutBlock]


def render(page: Page) -> str:
    """Render the whole HTML file."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    script, plotly = "\n".join(_part(name) for name in _SCRIPTS), get_plotlyjs()
    blocks = [
        {name: value for name, value in asdict(block).items() if name != "data"} for block in page.rollouts
    ]
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_part("template.html"))
        .render(
            page=page,
            version=__version__,
            policy=_security_policy([script, plotly]),
            colours=[colour(number) for number in range(len(page.runs))],
            interval_note=INTERVAL_NOTE,
            num_recorded=sum(len(run.rollouts) for run in page.runs),
            style=_part("style.css"),
            script=script,
            plotly=compress(plotly),
            figures_json=json_for_script([figure.spec for figure in page.figures]),
            index_json=json_for_script({"runs": [run.name for run in page.runs], "blocks": blocks}),
        )
    )


def json_for_script(data: object) -> str:
    r"""Encode JSON so that no string in it can end the script element or begin a comment.

    Every ``<`` becomes ``\u003c``, which JSON reads as the same character.
    """
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _security_policy(scripts: Sequence[str]) -> str:
    """Build the content security policy.

    Nothing is fetched, only these scripts run, and none of them may evaluate text. Plotly sets styles and
    draws into data and blob images.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
