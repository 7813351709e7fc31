"""The page: template, style and script put together into one file that may load nothing.

A content security policy forbids every request, and every script but ours, which it names by their hashes. What runs recorded is text: Jinja escapes it
in the template, the script sets it with textContent, and JSON inside a script element has its `<` escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files

from rpt_lightning import __version__
from rpt_lightning.evaluation.report.plot import Figure, colour
from rpt_lightning.evaluation.report.rollout_data import compress
from rpt_lightning.evaluation.report.tables import Table
from rpt_lightning.evaluation.report.verdict import Statement
from rpt_lightning.evaluation.run import Run
from rpt_lightning.evaluation.table import INTERVAL_NOTE

# One script element; each file is a part of the page and defines what the next ones use.
_SCRIPTS = ("app.js", "figures.js", "rollout_view.js", "rollouts.js")


@dataclass(frozen=True, kw_only=True)
class RolloutBlock:
    """The rollouts of one run's step, compressed. ``has_tokens``: False for files of earlier versions, which hold texts only."""

    run: int
    step: int
    num_rollouts: int
    has_tokens: bool
    data: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the template shows."""

    runs: Sequence[Run]
    verdicts: dict[str, list[Statement]]
    difficulty_tables: Sequence[Table]
    field_tables: Sequence[Table]
    run_table: Table
    pattern_tables: Sequence[Table]
    figures: Sequence[Figure]
    rollouts: Sequence[RolloutBlock]


def render(page: Page) -> str:
    """The whole HTML file."""
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
    r"""JSON that no string in it can end, or turn into a comment: every ``<`` becomes ``\u003c``, which JSON reads as the same character."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _security_policy(scripts: Sequence[str]) -> str:
    """Nothing is fetched, only these scripts run, and none of them may evaluate text. Plotly sets styles and draws into data and blob images."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
