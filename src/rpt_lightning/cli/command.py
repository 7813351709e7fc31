"""The ``rpt`` command: Lightning's verbs, and the tools around them.

Each verb imports only what it needs, so that help and tools start fast.
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rpt_lightning.cli.openmp import let_threads_sleep

LIGHTNING_VERBS = {
    "fit": "train a policy with RPT (RPTModule) or by next-token prediction (NTPModule)",
    "validate": "measure next-token accuracy at the same held-out positions, with and without reasoning",
}
TOOLS = {
    "plan": "estimate the tokens, memory, operations and time of `rpt fit` with the same flags; "
    "needs no GPU and no weights",
    "prepare": "turn a text corpus into a folder of next-token tasks",
    "export": "turn a checkpoint into a Hugging Face folder",
    "evaluate next-token": "measure the next-token accuracy of one or more policies, with "
    "samples, kinds of token, thought controls, cost and differences",
    "evaluate benchmark": "measure accuracy on AIME, MATH-500, MMLU-Pro, SuperGPQA or your own questions, "
    "with avg@k and pass@k, and with and without a thought",
    "compare": "show runs side by side with their cost: rpt compare RUN...",
    "scaling": "plot accuracy against training FLOPs, with the fitted law: rpt scaling RUN",
    "report": "make one HTML page about runs: rpt report RUN... [--output report.html]",
    "serve": "start the vLLM servers that a run's configuration names",
}
_PACKAGE = Path(__file__).parents[1]
# Commands that multiply matrices. The others only read files.
_COMPUTING = {*LIGHTNING_VERBS, "prepare", "evaluate", "serve"}
# Errors of Lightning, torch and safetensors that are caused by a file or a flag.
_LIBRARY_ERRORS = {"MisconfigurationException", "UnpicklingError", "SafetensorError"}
_MEANING = {
    "UnpicklingError": "a file is damaged, or is not what its flag asks for: ",
    "SafetensorError": "a model's .safetensors file is damaged (make or download the model again): ",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    An error that the user can fix becomes one message without a traceback (RPT_TRACEBACK=1 shows it).
    """
    args = list(sys.argv[1:] if args is None else args)
    # The parent process may have closed the streams. Output is then discarded and the work continues.
    sys.stdout, sys.stderr = (
        stream or open(os.devnull, "w")  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr)
    )
    command = args[0] if args else "--help"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    if command in _COMPUTING and not any(
        arg in ("-h", "--help") or arg.startswith("--print_config") for arg in args
    ):
        let_threads_sleep(os.environ)
    try:
        if command in ("-h", "--help"):
            print(_help())
        elif command == "--version":
            from rpt_lightning import __version__

            print(__version__)
        elif command in LIGHTNING_VERBS:
            from rpt_lightning.cli.run import run

            run(args)
        elif command == "plan":
            from rpt_lightning.cli.plan import run as run_plan

            run_plan(args[1:])
        elif command == "serve":  # reads a run's configuration, so it uses the same parser
            from rpt_lightning.cli.serve import serve

            serve(args[1:])
        elif (tool := " ".join(args[:2])) in TOOLS or (tool := command) in TOOLS:
            _run_tool(tool, args[len(tool.split()) :])
        else:
            raise ValueError(
                f"'{command}' is not a command of rpt; choose from {', '.join([*LIGHTNING_VERBS, *TOOLS])}, "
                "or see rpt --help"
            )
    except KeyboardInterrupt:
        print("rpt: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        text = _in_one_line(error)
        if text is None or os.environ.get("RPT_TRACEBACK") == "1":
            raise
        print(f"rpt: error: {text}", file=sys.stderr)
        return 1
    return 0


def _in_one_line(error: Exception) -> str | None:
    """Return the message for an error that a file or a flag can cause.

    Returns None if only a traceback shows where the error came from. We match the libraries' own error
    classes by name, because importing them would make every command slow.
    """
    if not _LIBRARY_ERRORS.isdisjoint(cls.__name__ for cls in type(error).__mro__):
        return f"{_MEANING.get(type(error).__name__, '')}{error}"
    if _is_of_own_code(error):
        return None
    if isinstance(error, (ValueError, OSError, RuntimeError)):
        return str(error)
    return _of_a_library(error)


def _of_a_library(error: Exception) -> str | None:
    """Describe a KeyError or similar error from an installed library.

    The text names the library and the function of ours that called it. Returns None for an error in our own
    code.
    """
    files = [
        (frame.f_code.co_filename, frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    ours = str(_PACKAGE) + os.sep
    last = max((index for index, (file, _) in enumerate(files) if file.startswith(ours)), default=None)
    library = next(
        (
            part
            for file, _ in files[len(files) if last is None else last + 1 :]
            if (part := _library_of(file))
        ),
        None,
    )
    if last is None or library is None:
        return None
    file, function = files[last]
    said = str(error) if isinstance(error, (ImportError, AttributeError)) else repr(error)
    return (
        f"{library} failed in {function} (rpt_lightning/{file.removeprefix(ours)}): {said}. The likely cause "
        f"is a file, a model or a version that {library} does not accept; RPT_TRACEBACK=1 shows the traceback"
    )


def _library_of(file: str) -> str | None:
    """The installed package that a file belongs to."""
    _, found, rest = file.partition("site-packages" + os.sep)
    return rest.split(os.sep)[0].removesuffix(".py") if found else None


def _is_of_own_code(error: Exception) -> bool:
    """Whether the error comes from the user's own class, or from something that it called.

    Only a traceback shows where. It then has a frame in a file that belongs neither to this package nor to an
    installed library nor to Python.
    """
    known = [
        str(_PACKAGE),
        *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    ]
    frames = traceback.walk_tb(error.__traceback__)
    return any(
        os.path.isabs(file)
        and "site-packages" not in file
        and not file.startswith(tuple(folder + os.sep for folder in known))
        for file in (frame.f_code.co_filename for frame, _ in frames)
    )


def _no_progress_bars() -> None:
    """Turn progress bars off: in a file or a pipe they are clutter.

    Libraries read both variables when they are imported. A value that is already set stays.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


# Imported by name, so that one tool does not pay for another's libraries.
_MODULES = {
    "prepare": "rpt_lightning.data.prepare.prepare_command",
    "export": "rpt_lightning.export",
    "evaluate next-token": "rpt_lightning.evaluation.next_token",
    "evaluate benchmark": "rpt_lightning.evaluation.benchmark",
    "compare": "rpt_lightning.evaluation.compare_runs",
    "scaling": "rpt_lightning.evaluation.scaling.figure",
    "report": "rpt_lightning.evaluation.report.report_command",
}
# Imported as well, so that configs can use the short names of their classes.
_OBJECTIVES = tuple(
    f"rpt_lightning.objectives.{name}"
    for name in ("information_gain", "masked_span", "proposed_span", "next_segment", "next_sentence")
)
_PARTS = {"prepare": ("rpt_lightning.worlds", *_OBJECTIVES), "evaluate next-token": _OBJECTIVES}
# Parameters that take plain words. jsonargparse would take a list as one word in JSON.
_RUNS = ("runs", "run folders (the values of trainer.default_root_dir)")
_POLICIES = ("--policy", "Hugging Face folders (or hub ids), or checkpoints of rpt fit")
_WORDS = {
    "compare": _RUNS,
    "scaling": _RUNS,
    "report": _RUNS,
    "evaluate next-token": _POLICIES,
    "evaluate benchmark": _POLICIES,
}


def _run_tool(tool: str, args: list[str]) -> None:
    from jsonargparse import ArgumentParser, Namespace, auto_cli

    from rpt_lightning.cli.former_names import accept_former_names
    from rpt_lightning.cli.home_paths import with_home
    from rpt_lightning.cli.short_errors import ShortErrors

    class Parser(ShortErrors, ArgumentParser):
        def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
            parsed: Namespace = with_home(super().parse_args(*args, **kwargs))
            return parsed

    accept_former_names()
    if not sys.stderr.isatty():
        _no_progress_bars()
    function = getattr(importlib.import_module(_MODULES[tool]), tool.split()[-1].replace("-", "_"))
    for part in _PARTS.get(tool, ()):
        importlib.import_module(part)
    if tool not in _WORDS:
        auto_cli(function, args=args, as_positional=False, prog=f"rpt {tool}", parser_class=Parser)
        return
    words, meaning = _WORDS[tool]
    parser = Parser(prog=f"rpt {tool}", description=(function.__doc__ or "").split("\n", 1)[0])
    if words.startswith("--"):
        parser.add_argument("--config", action="config", help="a YAML file that sets these parameters")
        parser.add_argument(words, nargs="+", required=True, help=meaning)
    else:
        parser.add_argument(words, nargs="+", metavar=words.removesuffix("s").upper(), help=meaning)
    parser.add_function_arguments(function, skip={words.removeprefix("--")})
    values = parser.instantiate(parser.parse_args(args)).as_dict()
    function(**{name: value for name, value in values.items() if name != "config"})


def _help() -> str:
    lines = [
        "usage: rpt COMMAND [--config FILE ...] [--KEY VALUE ...]",
        "",
        "Reinforcement Pre-Training (arXiv:2506.08007) on Lightning.",
        "",
    ]
    for title, commands in (("training and validation", LIGHTNING_VERBS), ("tools", TOOLS)):
        lines += [f"{title}:", *(f"  {name:<19} {text}" for name, text in commands.items()), ""]
    lines.append(
        "rpt COMMAND --help lists the options of a command. "
        "rpt fit --config FILE --print_config prints the whole configuration."
    )
    return "\n".join(lines)
