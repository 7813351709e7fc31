"""Math-Verify in a process of its own.

It reads one pair (true answer, prediction) per line and writes one verdict per line, as JSON.

A prediction is text of a model, and SymPy evaluates the text that it reads. ``9^{9^{9^9}}`` computes for
longer than anyone waits, in C code that no Python signal interrupts. The kernel therefore ends this process
when a pair has used up its CPU seconds, and ``verifier.py`` starts another. The limit counts CPU seconds
rather than clock time, because a verdict must not depend on what else the machine does.

This module imports nothing of this package, since it is started often.
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
    """Compare until the other end of the pipe is closed. The argument is the limit of CPU seconds."""
    cpu_limit_s = float(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # text that libraries print must not get between the verdicts
    # These signals are meant for the run, which may still want a verdict. This process ends with the run.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Windows has no such module, or a lower limit is already set.
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    # The first comparison of each kind builds its parser. That must not count against a prediction's time.
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
    r"""Return ``right``, ``wrong`` or ``unreadable``. Both texts are the contents of a ``\boxed{...}``.

    Errors of Math-Verify are raised. Its time limits are off: they are signals, which wait for C code to
    return.
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
        # Each text is read as an expression and as a string. If one comparison fails, another may find them
        # equal.
        if verify(gold, found, timeout_seconds=None):
            return "right"
        raise


def _set_alarm(cpu_s: float) -> None:
    """Set the CPU alarm, whose default action ends the process, whatever it is computing.

    Windows has no such alarm. There, only the clock of the other process applies.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_s)


if __name__ == "__main__":
    main()
