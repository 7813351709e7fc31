"""Math-Verify in a process of its own: one pair (true answer, prediction) a line in, one verdict a line out, as JSON.

A prediction is text of a model, and SymPy evaluates what it reads: ``9^{9^{9^9}}`` computes for longer than anyone waits, in C code that no Python signal
interrupts. So the kernel ends this process when a pair has used up its CPU seconds, and ``math_verifier.py`` starts another. Seconds of CPU and not of
the clock: a verdict must not depend on what else the machine does.

Imports nothing of this package, since it is started often.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys

MAX_MEMORY = 4 * 2**30  # bytes of address space


def main() -> None:
    """Compares until the other end of the pipe is closed; the argument is the limit of CPU seconds."""
    cpu_limit_s = float(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand between verdicts
    for name in (
        "SIGINT",
        "SIGTERM",
        "SIGHUP",
        "SIGUSR1",
        "SIGUSR2",
    ):  # meant for the run, which may still want a verdict; we end with it
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    with contextlib.suppress(
        ImportError, ValueError
    ):  # no such module on Windows; a lower limit is set already
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    # The first of each kind builds its parser, which must not count against a prediction's time.
    compare(r"\frac{1}{2}", r"\{0, \sqrt{2}\}")
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        answer, prediction = json.loads(line)
        _set_alarm(cpu_limit_s)
        try:
            verdict = compare(answer, prediction)
        except Exception as error:
            verdict = f"error: {type(error).__name__}"
        _set_alarm(0.0)
        print(json.dumps(verdict), file=answers)


def compare(answer: str, prediction: str) -> str:
    r"""``right``, ``wrong`` or ``unreadable``; raises what Math-Verify raises. Both are the contents of a ``\boxed{...}``.

    Math-Verify's time limits are off: they are signals, which wait for C code to return.
    """
    from math_verify import parse, verify

    gold, found = (
        parse(rf"\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
        for text in (answer, prediction)
    )
    if not gold:
        raise ValueError("Math-Verify reads nothing in the true answer")
    if not found:
        return "unreadable"
    try:
        return "right" if verify(gold, found, timeout_seconds=None, raise_on_error=True) else "wrong"
    except Exception:
        # Each is read as an expression and as a string. One comparison failed; another may still find them equal.
        if verify(gold, found, timeout_seconds=None):
            return "right"
        raise


def _set_alarm(cpu_s: float) -> None:
    """Its default action ends the process, whatever it is computing. Windows has none; the other process has a clock as well."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_s)


if __name__ == "__main__":
    main()
