"""The tables of docs/scaling.md: the plan of the 14B run on 8, 64 and 1,024 H100s.

Rollouts are in the trainer or on servers.

python scripts/scaling_table.py            # writes and prints the tables
python scripts/scaling_table.py --check    # exits with status 1 if the document has other tables

The numbers are `rpt plan`'s arithmetic on the configuration files and the model's sizes. Nothing was measured
on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jsonargparse import Namespace

from rpt_lightning.cli.plan import parse, plan_of
from rpt_lightning.evaluation.marked_section import replace_section
from rpt_lightning.planning.bottlenecks import bottleneck
from rpt_lightning.planning.host_memory import offloaded_moment_bytes
from rpt_lightning.planning.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- made by scripts/scaling_table.py -->", "<!-- end of tables -->"
CONFIGS = ROOT / "configs"
# Sizes of the policy's model. Its weights are not needed.
MODEL_CONFIG = ROOT / "scripts" / "qwen2-14b.json"
IN_TRAINER = ["--config", str(CONFIGS / "14b.yaml"), "--config", str(CONFIGS / "strategy" / "fsdp2.yaml")]
ON_SERVERS = [*IN_TRAINER, "--config", str(CONFIGS / "rollout" / "servers.yaml")]
LAYERS = {
    "in the trainer": IN_TRAINER,
    "in the trainer, asleep in training": IN_TRAINER,  # only if memory is short
    "servers, folder": ON_SERVERS,
    "servers, NCCL": ON_SERVERS,
}
FLAGS = [
    "--trainer.strategy.gather_bf16",
    "true",
    "--plan.device",
    "h100",
    "--plan.model_config",
    str(MODEL_CONFIG),
    "--plan.context_tokens",
    "1920",
]
# All devices, and how many of them are servers if the trainer does not generate itself.
SERVERS = {8: 2, 64: 32, 1024: 512}
GB = 1e9


def plans() -> list[tuple[str, Plan, list[str]]]:
    """Return ``(place of the rollouts, plan, its assumptions)`` for every row."""
    parsed = {name: parse([*layers, *FLAGS]) for name, layers in LAYERS.items()}
    rows = [(name, devices) for devices in SERVERS for name in parsed if devices == 8 or "asleep" not in name]
    return [(name, *plan_of(_sized(parsed[name].clone(), name, devices))) for name, devices in rows]


def _sized(config: Namespace, name: str, devices: int) -> Namespace:
    servers = SERVERS[devices] if name.startswith("servers") else 0
    sleeps = name == "in the trainer, asleep in training"
    if sleeps:
        config.rollout.engine.init_args.sleep_in_training = True
        config.rollout.engine.init_args.gpu_memory_utilization = 0.75
    if name == "servers, NCCL":
        config.rollout.engine.init_args.transport = Namespace(class_path="NCCLTransport")
    config.plan.num_devices, config.plan.num_servers = devices - servers, servers or None
    # Eight devices cannot hold the optimizer beside an engine: configs/14b.yaml.
    config.model.init_args.offload_moments = devices == 8 and not servers
    if devices > 8 and not servers:
        config.rollout.engine.init_args.gpu_memory_utilization = 0.6
    return config


def render(rows: list[tuple[str, Plan, list[str]]]) -> str:
    """Format times, then memory and traffic, then the assumptions, in Markdown."""
    columns = [
        "rollouts",
        "prompts",
        "decoding",
        "training",
        "weight sync",
        "**step**",
        "overlapped",
        "longest completion",
        "first bottleneck",
    ]
    times = [_row(["H100s", *columns]), _row(["---"] * (len(columns) + 1))]
    columns = [
        "rollouts",
        "peak of a training device",
        "free on it",
        "on its host",
        "a server's cache",
        "sent for training",
        "sent for weight sync",
        "received by a server",
    ]
    memory = [_row(["H100s", *columns]), _row(["---"] * (len(columns) + 1))]
    for name, plan, _ in rows:
        settings, step, fit = plan.settings, plan.times, plan.fit
        devices = settings.num_devices + settings.num_servers
        where = name if not settings.num_servers else f"{settings.num_servers:,} {name}"
        first = [f"{devices:,}", where]
        seconds = (step.prefill_s, step.decode_s, step.train_s, step.sync_s)
        overlapped = _number(step.overlapped_s) if settings.num_servers else "-"
        cells = [
            *map(_number, seconds),
            f"**{_number(step.step_s)}**",
            overlapped,
            _number(step.longest_decode_s),
            bottleneck(plan),
        ]
        times.append(_row([*first, *cells]))
        host = (
            offloaded_moment_bytes(
                plan.shape,
                num_shards=settings.num_ranks,
                optimizer_bytes_per_param=settings.optimizer_bytes_per_param,
            )
            if settings.offload_moments
            else 0.0
        )
        sizes = (
            fit.total_bytes,
            fit.device_bytes - fit.total_bytes,
            host,
            fit.engine.kv_cache_bytes if settings.num_servers else 0.0,
            plan.traffic.train_bytes,
            plan.traffic.gather_bytes,
            plan.traffic.server_bytes,
        )
        memory.append(_row([*first, *("-" if size == 0 else _number(size / GB) for size in sizes)]))
    assumed = dict.fromkeys(
        text.replace(str(ROOT) + "/", "") for _, _, assumptions in rows for text in assumptions
    )
    return "\n".join(
        [
            "Estimated seconds of a step. *Overlapped* is the time of a step whose policy trains while the "
            "next rollouts are generated. *Longest completion* is the time to decode 8,192 tokens.",
            "",
            *times,
            "",
            "Estimated peak memory, and data that a device sends or receives in a step, in GB (10^9 bytes).",
            "",
            *memory,
            "",
            "We assume:",
            *(f"- {text}" for text in assumed),
        ]
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    """Format three digits, so that differences in processors' arithmetic do not show.

    >>> [_number(value) for value in (0.01234, 1.0, 87.654, 1234.5)]
    ['0.0123', '1.00', '87.7', '1,230']
    """
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.{2 if value < 10 else 1}f}"


def with_tables(text: str, tables: str) -> str:
    """Return the document with new tables between its markers."""
    return replace_section(text, f"{tables}\n", begin=BEGIN, end=END, where=str(DOCUMENT))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # Lightning's parser warns if the process has arguments of its own
    tables = render(plans())
    text = DOCUMENT.read_text()
    updated = with_tables(text, tables)
    if args.check and updated != text:
        sys.exit(f"{DOCUMENT.relative_to(ROOT)}: not the plan's tables; run python scripts/scaling_table.py")
    if not args.check:
        DOCUMENT.write_text(updated)
        print(tables)


if __name__ == "__main__":
    main()
