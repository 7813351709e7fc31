"""Run a longer computation in stages, each of which is one command that a user could type.

Stages run in order and are timed. After an interruption the computation continues where it stopped.
"""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXECUTABLE = str(Path(sys.executable).with_name("rpt"))
Command = Callable[[], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a computation. Its command is built when the stage begins.

    Attributes:
        name: Name of the stage.
        command: Builds the command.
        output: File or folder that the command leaves behind.
        minutes: Approximate duration on two cores.
        folder: Keeps the marks and times of finished stages. Computations that share a stage name one folder.
        run_folder: A fit's folder. It is moved aside if an earlier stage runs again.
        output_comes_last: Whether the output alone shows that the command finished, as a fit's last
            checkpoint does.
        feeds_later: Whether later stages use the output of this one.
        always: Whether the stage is never skipped.
    """

    name: str
    command: Command
    output: Path
    minutes: float
    folder: Path
    run_folder: Path | None = None
    output_comes_last: bool = False
    feeds_later: bool = True
    always: bool = False

    @property
    def _mark(self) -> Path:
        return self.folder / "finished" / self.name.replace(" ", "-")

    @property
    def is_finished(self) -> bool:
        # Other outputs may exist before they are complete, or may belong to an earlier policy. So a finished
        # stage leaves a mark.
        return not self.always and self.output.exists() and (self.output_comes_last or self._mark.exists())

    def forget(self) -> None:
        """Discard the mark of this stage, because something that it used is made again."""
        self._mark.unlink(missing_ok=True)
        forget_time(self.folder, self.name)
        if self.run_folder is not None and self.run_folder.exists():
            names = (
                self.run_folder.with_name(f"{self.run_folder.name}.old-{number}")
                for number in itertools.count(1)
            )
            aside = next(path for path in names if not path.exists())
            self.run_folder.rename(aside)
            print(
                f"an earlier stage runs again, so {self.run_folder} is made again; the previous run is now "
                f"in {aside}"
            )

    def run(self) -> None:
        command = self.command()
        shown = shlex.join(command).replace(EXECUTABLE, "rpt").replace(sys.executable, "python")
        print("$", shown, flush=True)
        if self._mark.exists():  # it finished before, but its output is gone
            forget_time(self.folder, self.name)
        start = time.monotonic()
        try:
            subprocess.run(command, check=True)
        finally:  # an interrupted part belongs to the stage's time
            add_time(self.folder, self.name, time.monotonic() - start)
        self._mark.parent.mkdir(parents=True, exist_ok=True)
        self._mark.write_text(json.dumps({"command": shown, "commit": commit()}) + "\n")

    def history(self) -> dict[str, object]:
        """Describe how the stage ran: its seconds, and the command and commit of its last part.

        Command and commit are None if an earlier version finished it.
        """
        text = self._mark.read_text() if self._mark.exists() else ""
        return {
            "name": self.name,
            "seconds": read_times(self.folder).get(self.name),
            **(json.loads(text) if text else {"command": None, "commit": None}),
        }


def commit() -> str | None:
    """Return the commit of this program, or None outside of git.

    A "+" follows it if files differ from the commit.
    """
    git = ("git", "-C", str(ROOT))
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes.strip() else "")


def read_times(folder: Path) -> dict[str, float]:
    """Read the seconds that each stage took, over all calls."""
    path = folder / "times.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_times(folder: Path, times: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "times.json").write_text(json.dumps(times, indent=2) + "\n")


def add_time(folder: Path, name: str, seconds: float) -> None:
    times = read_times(folder)
    write_times(folder, times | {name: round(times.get(name, 0.0) + seconds, 1)})


def forget_time(folder: Path, name: str) -> None:
    times = read_times(folder)
    if times.pop(name, None) is not None:
        write_times(folder, times)


def time_table(stages: Sequence[Stage]) -> str:
    """Format the minutes of each stage, without the installation."""
    times = {
        stage.name: seconds
        for stage in stages
        if (seconds := read_times(stage.folder).get(stage.name)) is not None
    }
    rows = [f"  {name:<26}{seconds / 60:6.1f} min" for name, seconds in times.items()]
    return "\n".join(["Time by stage:", *rows, f"  {'together':<26}{sum(times.values()) / 60:6.1f} min"])


def run_stages(stages: Sequence[Stage], *, program: str, again: str) -> None:
    """Run the unfinished stages in order.

    ``again`` is the command that resumes the computation after an interruption.
    """
    start = time.monotonic()
    todo: list[Stage] = []
    for stage in stages:
        if any(earlier.feeds_later for earlier in todo):
            stage.forget()
        if not stage.is_finished:
            todo.append(stage)
    planned = 0.0  # minutes that the stages done in this call should have taken
    for number, stage in enumerate(stages, start=1):
        title = f"stage {number} of {len(stages)}: {stage.name}"
        if stage not in todo:
            print(f"=== {title}: finished before, skipped")
            continue
        elapsed = (time.monotonic() - start) / 60
        # The plan for the rest, scaled by how much slower or faster than planned this machine has been.
        left = sum(other.minutes for other in stages[number - 1 :] if other in todo) * (
            elapsed / planned if planned else 1
        )
        print(f"=== {title} | {elapsed:.0f} min elapsed, about {left:.0f} min left", flush=True)
        try:
            stage.run()
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"{program}: {title} failed (exit status {error.returncode}, message above). "
                f"`{again}` tries it again."
            ) from error
        except KeyboardInterrupt:
            raise SystemExit(f"\n{program}: interrupted in {title}. `{again}` continues there.") from None
        planned += stage.minutes
