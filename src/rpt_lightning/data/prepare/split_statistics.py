"""Statistics of a split, collected while its items are written.

They are counts, a histogram of the entropy, and the ceiling that unanswerable positions put on accuracy.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.data.store.item_format import FIELDS, item_digest
from rpt_lightning.data.store.manifest import SplitSummary

HISTOGRAM_FILE = "histogram.png"
# A position belongs to a band if its entropy in nats exceeds the threshold. Hard positions are therefore also
# medium and easy ones, as in the paper (section 3.3).
BANDS: dict[str, float] = {"easy": 0.5, "medium": 1.0, "hard": 1.5}
BIN_EDGES = np.round(np.arange(0.0, 2.9, 0.1), 1)  # nats; the entropy of 16 tokens is at most ln 16 = 2.77


class SplitStatistics:
    """Counts of one split."""

    def __init__(self) -> None:
        self.num_documents = 0
        self.num_tokens = 0
        self.num_scored = 0
        self.num_unanswerable = 0
        self.num_without_material = 0
        self.last_position = 0
        self.positions: list[dict[str, NDArray[Any]]] = []
        self.fields: Counter[str] = Counter()  # number of positions that have each field
        self.digests: list[bytes] = []  # of the items, in their order
        self.histogram = np.zeros(len(BIN_EDGES) - 1, dtype=np.int64)

    def add_scores(self, entropy: NDArray[np.float32]) -> None:
        """Count the entropies of all scored positions of a document, selected or not."""
        scored = entropy[~np.isnan(entropy)]
        self.num_scored += len(scored)
        self.histogram += np.histogram(np.clip(scored, BIN_EDGES[0], BIN_EDGES[-1]), BIN_EDGES)[0]

    def add_item(self, item: dict[str, Any], num_unanswerable: int) -> None:
        """Count a document that is being written."""
        self.num_documents += 1
        self.digests.append(item_digest(item))
        self.fields.update(name for row in item.get(FIELDS) or () for name in row)
        self.num_tokens += len(item["token_ids"])
        self.num_unanswerable += num_unanswerable
        self.last_position = max(self.last_position, int(item["positions"].max()))
        self.positions.append({name: item[name] for name in ("entropy", "true_rank", "answerable")})

    def summary(self) -> SplitSummary:
        """Summarise the stored positions, in total and above each band's threshold.

        The bands include the proxy's own next-token accuracy.
        """
        columns = {
            name: np.concatenate([row[name] for row in self.positions] or [np.zeros(0)])
            for name in ("entropy", "true_rank", "answerable")
        }
        return SplitSummary(
            fields=dict(sorted(self.fields.items())),
            documents=self.num_documents,
            tokens=self.num_tokens,
            scored_positions=self.num_scored,
            positions=len(columns["entropy"]),
            unanswerable=self.num_unanswerable,
            without_material=self.num_without_material,
            last_position=self.last_position,
            entropy_histogram={
                "bin_edges_nats": BIN_EDGES.tolist(),
                "scored_positions": self.histogram.tolist(),
            },
            bands={
                band: _band_summary(
                    columns["true_rank"][columns["entropy"] > threshold],
                    columns["answerable"][columns["entropy"] > threshold],
                )
                for band, threshold in BANDS.items()
            },
        )


def _band_summary(true_rank: NDArray[Any], answerable: NDArray[Any]) -> dict[str, Any]:
    count = len(true_rank)
    return {
        "positions": count,
        "unanswerable": int((answerable == 0).sum()),
        "accuracy_ceiling": round(float(answerable.mean()), 4) if count else None,
        "proxy_next_token_accuracy": round(float((true_rank == 0).mean()), 4) if count else None,
    }


def plot_histogram(
    path: Path, histograms: dict[str, NDArray[np.int64]], thresholds: dict[str, float]
) -> None:
    """Plot the share of scored positions by entropy, with one line per split, and mark the thresholds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, counts in histograms.items():
        axes.stairs(
            counts / max(counts.sum(), 1),
            BIN_EDGES,
            label=f"{name}: {int(counts.sum()):,} positions",
            linewidth=1.8,
        )
    for style, (name, threshold) in zip(("-", "--", ":"), thresholds.items(), strict=False):
        axes.axvline(threshold, color="0.4", linestyle=style, linewidth=1.0, label=f"{name} > {threshold:g}")
    axes.set_xlabel("proxy entropy over its 16 most likely tokens (nats)")
    axes.set_ylabel("share of scored positions")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
