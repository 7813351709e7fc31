"""Compare how OpenMP's threads wait for each other: steps of two models under five settings.

    python benchmarks/bench_threads.py                      # writes benchmarks/results/threads-*.json
    python benchmarks/bench_threads.py --work tiny --rounds 9

The steps run alone and beside one busy process. Each setting has its own process, because OpenMP reads its
variables when it is loaded. A process waits until it is asked for a step. All processes are asked in turn,
alone and beside the busy process, so other load on the machine affects all of them alike. One kind of work is
forward and backward of a Llama of 0.7M parameters on 64 x 48 tokens. The other is the same for four layers of
SmolLM2-135M, with its embedding and head, on 4 x 64 tokens. src/rpt_lightning/cli/openmp.py shows which of
these settings `rpt` uses.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import machine
import torch
from models import SMOLLM2_135M
from result import keep_rounds, store

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "no-spin": {"GOMP_SPINCOUNT": "0"},
    "short-spin": {"GOMP_SPINCOUNT": "10000"},  # about 0.1 ms, a thirtieth of GNU's own value
    "one-thread": {"OMP_NUM_THREADS": "1"},
}
TINY = {
    "vocab_size": 350, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
# Model and batch [sequences, tokens]. More layers of the large model would only take longer.
TRAINING = {"tiny": (TINY, (64, 48)), "135m": (SMOLLM2_135M | {"num_hidden_layers": 4}, (4, 64))}
# The busy process ends with the benchmark, whatever the cause.
BUSY = (
    "import os\nparent = os.getppid()\nprint('busy', flush=True)\n"
    "while os.getppid() == parent:\n    for _ in range(10**6): pass"
)
LOADS = ("alone", "busy")
QUIET = 0.05  # share of the machine's CPU time in other processes


class Worker:
    """A process that runs a number of steps whenever it is asked, with the given OpenMP settings."""

    def __init__(self, work: str, environment: dict[str, str], *, steps: int) -> None:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OMP_", "GOMP_", "KMP_"))
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", "--work", work, "--steps", str(steps)],
            env=inherited | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def wait(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"a worker ended with status {self.process.wait()}; its error is shown above")
        return line.strip()

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.wait()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # the worker reads the end of its input and ends
        self.process.wait()


def training_step(work: str) -> Callable[[], object]:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, batch = TRAINING[work]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    token_ids = torch.randint(shape["vocab_size"], batch)  # [B, T]

    def step() -> None:
        model.zero_grad()
        model(token_ids, labels=token_ids).loss.backward()

    return step


def work_when_asked(work: str, *, steps: int) -> None:
    """Run the worker's side: read a line, run the steps, write a line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries must not count as an answer
    step = training_step(work)
    answers.write(f"{torch.get_num_threads()}\n")
    for _ in sys.stdin:
        for _ in range(steps):
            step()
        answers.write("done\n")


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of a process.

    ``others`` is the share of the machine's CPU time that other processes took meanwhile, without the busy
    process.
    """

    seconds: float
    others: float


def ask(worker: Worker) -> Sample:
    load, start = machine.OtherLoad(), time.perf_counter()
    worker.step()
    return Sample(time.perf_counter() - start, load.share())


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Run another process with the same priority that computes all the time."""
    process = subprocess.Popen([sys.executable, "-S", "-c", BUSY], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it has started
        yield
    finally:
        process.kill()
        process.wait()


def wait_for_quiet(until_s: float) -> None:
    """Return once other processes are idle for a moment, or at ``until_s`` of the monotonic clock."""
    while time.monotonic() < until_s:
        load = machine.OtherLoad()
        time.sleep(0.3)
        if load.share() < QUIET:
            return


def sample_all(
    work: str, names: list[str], *, rounds: int, steps: int, patience_s: float
) -> tuple[dict[str, list[Sample]], dict[str, int]]:
    """Sample each setting alone and busy, ``rounds`` times each after one round for warm-up.

    Also returns the number of threads of each setting.
    """
    workers = {name: Worker(work, SETTINGS[name], steps=steps) for name in names}
    samples: dict[str, list[Sample]] = {f"{name} {load}": [] for load in LOADS for name in names}
    try:
        threads = {name: int(worker.wait()) for name, worker in workers.items()}
        until_s = time.monotonic() + patience_s
        for number in range(rounds + 1):
            for load in LOADS:
                for name, worker in workers.items():
                    if load == "alone":
                        wait_for_quiet(until_s)
                        sample = ask(worker)
                    else:
                        with busy_process():
                            sample = ask(worker)
                    print(
                        f"  round {number} {name} {load}: {sample.seconds:.3g} s, others {sample.others:.0%}",
                        flush=True,
                    )
                    if number:
                        samples[f"{name} {load}"].append(sample)
    finally:
        for worker in workers.values():
            worker.end()
    return samples, threads


def measure(work: str, names: list[str], *, keep: bool, **options: Any) -> None:
    """Print the table of one kind of work, and store the figures that the choice depends on."""
    load = machine.OtherLoad()
    samples, threads = sample_all(work, names, **options)
    print(f"{work}: seconds of {options['steps']} steps, {options['rounds']} rounds\n{table(samples, names)}")
    # "Alone" should mean alone: if there were undisturbed samples, the others are left out.
    seconds = keep_rounds(
        {
            name: [sample.seconds for sample in undisturbed(values) or values]
            for name, values in samples.items()
        },
        other_load=load.share(),
    )
    details: dict[str, Any] = {
        "keep": keep,
        "target": None,
        "steps": options["steps"],
        "work_threads": threads,
        "undisturbed": {name: len(undisturbed(values)) for name, values in samples.items()},
        "samples": {
            name: [(round(sample.seconds, 4), round(sample.others, 3)) for sample in values]
            for name, values in samples.items()
        },
    }
    unit = "times the speed of threads that spin while they wait, with nothing else running"
    store(
        f"threads-passive-alone-{work}",
        seconds["default alone"] / seconds["passive alone"],
        limit=1.0,
        unit=unit,
        **details,
    )
    # The scheduler gives each thread the same time. With one more thread on the machine, ours have
    # cores / (cores + 1) of it.
    cores = os.cpu_count() or 1
    for name in ("default", "passive"):
        share = min(seconds["default alone"], seconds["passive alone"]) / seconds[f"{name} busy"]
        unit = "times the speed without other processes, beside one busy process"
        store(f"threads-{name}-busy-{work}", share, limit=cores / (cores + 1), unit=unit, **details)


def undisturbed(samples: list[Sample]) -> list[Sample]:
    """Return the samples during which other processes were idle."""
    return [sample for sample in samples if sample.others < QUIET]


def table(samples: dict[str, list[Sample]], names: list[str]) -> str:
    """Format a table in Markdown with one row for each setting.

    Undisturbed are samples during which other processes were idle.
    """
    heads = [
        f"{load}{part}"
        for load in LOADS
        for part in (": least", ", median", ", median undisturbed (samples)")
    ]
    lines = [f"| setting | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in names:
        cells = []
        for load in LOADS:
            values = samples[f"{name} {load}"]
            seconds, quiet = (
                [sample.seconds for sample in values],
                [sample.seconds for sample in undisturbed(values)],
            )
            cells += [
                f"{min(seconds):.3f}",
                f"{statistics.median(seconds):.3f}",
                f"{statistics.median(quiet):.3f} ({len(quiet)})" if quiet else "none",
            ]
        setting = (
            " ".join(f"{variable}={value}" for variable, value in SETTINGS[name].items()) or "nothing set"
        )
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=list(TRAINING), default=list(TRAINING))
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=list(SETTINGS),
        default=list(SETTINGS),
        help="settings to compare; default and passive are always included",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=1, help="steps that a process runs each time it is asked"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        help="total seconds, for each kind of work, to wait for moments without other processes",
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="run one round of the tiny model under two of the settings, store nothing",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work_when_asked(args.work[0], steps=args.steps)
        return
    names = [name for name in SETTINGS if name in ("default", "passive", *args.settings)]
    if args.short:
        args.work, args.rounds, args.patience, names = ["tiny"], 1, 0.0, ["default", "passive"]
    print(f"machine: {machine.description()}")
    for work in args.work:
        measure(
            work, names, keep=not args.short, rounds=args.rounds, steps=args.steps, patience_s=args.patience
        )


if __name__ == "__main__":
    main()
