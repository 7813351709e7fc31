"""`make bench` and `make bench-short`: run every benchmark in its own process, then write the table.

python benchmarks/run_all.py [--short]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="run tiny shapes and store nothing, to check that all run and that both sides compute the same",
    )
    options = ["--short"] if parser.parse_args().short else []
    failed = []
    for path in sorted(FOLDER.glob("bench_*.py")):
        print(f"=== {path.name}", flush=True)
        start = time.monotonic()
        if subprocess.run([sys.executable, path, *options]).returncode:
            failed.append(path.name)
        print(f"    {time.monotonic() - start:.0f} s", flush=True)
    if not options:
        subprocess.run([sys.executable, FOLDER / "table.py"], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
