"""The ``rpt`` command: Lightning's verbs, and the tools around them. Each verb imports what it needs, so that help and tools start fast."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

LIGHTNING_VERBS = {
    "fit": "train a policy (by reasoning: RPTModule; by standard next-token prediction: NTPModule)",
    "validate": "next-token accuracy on held-out positions, by reasoning and without, at the same positions",
}
TOOLS = {
    "plan": "what a run of `rpt fit` with the same flags will cost: tokens, memory, operations, time; needs no GPU and no weights",
    "prepare": "turn a text corpus into a folder of next-token tasks",
    "export": "turn a checkpoint into a Hugging Face folder",
    "report": "make one HTML page about runs: rpt report RUN... [--output report.html]",
    "serve": "start the vLLM servers that a run's configuration names",
}
# Errors of Lightning, torch and safetensors that a file or a flag caused.
_LIBRARY_ERRORS = {"MisconfigurationException", "UnpicklingError", "SafetensorError"}
_MEANING = {
    "UnpicklingError": "a file is damaged, or is not what its flag asks for: ",
    "SafetensorError": "a model's .safetensors file is damaged (make or download the model again): ",
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors that a user can mend are one message, without a traceback (RPT_TRACEBACK=1 shows it)."""
    args = list(sys.argv[1:] if args is None else args)
    command, rest = (args[0], args[1:]) if args else ("--help", [])
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    try:
        if command in ("-h", "--help"):
            print(_help())
        elif command == "--version":
            from rpt_lightning import __version__

            print(__version__)
        elif command in LIGHTNING_VERBS:
            from rpt_lightning.lightning_cli import run

            run(args)
        elif command == "plan":
            from rpt_lightning.plan_cli import run as run_plan

            run_plan(rest)
        elif command == "serve":  # reads a run's configuration, so it has that parser
            from rpt_lightning.serve import serve

            serve(rest)
        elif command in TOOLS:
            _run_tool(command, rest)
        else:
            raise ValueError(f"'{command}' is not a command of rpt; choose from {', '.join([*LIGHTNING_VERBS, *TOOLS])}, or see rpt --help")
    except KeyboardInterrupt:
        print("rpt: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_mendable(error) or os.environ.get("RPT_TRACEBACK") == "1":
            raise
        print(f"rpt: error: {_MEANING.get(type(error).__name__, '')}{error}", file=sys.stderr)
        return 1
    return 0


def _is_mendable(error: Exception) -> bool:
    """Libraries' own classes go by their names: importing them would make every command slow."""
    return isinstance(error, (ValueError, OSError, RuntimeError)) or not _LIBRARY_ERRORS.isdisjoint(cls.__name__ for cls in type(error).__mro__)


# Imported by name, so that one tool does not pay for another's libraries.
_MODULES = {"prepare": "rpt_lightning.data.prepare", "export": "rpt_lightning.export", "report": "rpt_lightning.evaluation.report.command"}
# Parameters that are given as plain words. jsonargparse would take a list as one word in JSON.
_WORDS = {"report": "runs"}


def _run_tool(command: str, args: list[str]) -> None:
    from jsonargparse import ArgumentParser, auto_cli

    function = getattr(importlib.import_module(_MODULES[command]), command)
    if command not in _WORDS:
        auto_cli(function, args=args, as_positional=False, prog=f"rpt {command}")
        return
    words = _WORDS[command]
    parser = ArgumentParser(prog=f"rpt {command}", description=(function.__doc__ or "").split("\n", 1)[0])
    parser.add_argument(words, nargs="+", metavar=words.removesuffix("s").upper(), help="run folders (what trainer.default_root_dir was)")
    parser.add_function_arguments(function, skip={words})
    function(**vars(parser.parse_args(args)))


def _help() -> str:
    lines = ["usage: rpt COMMAND [--config FILE ...] [--KEY VALUE ...]", "", "Reinforcement Pre-Training (arXiv:2506.08007) on Lightning.", ""]
    for title, commands in (("training and validation", LIGHTNING_VERBS), ("tools", TOOLS)):
        lines += [f"{title}:", *(f"  {name:<10} {text}" for name, text in commands.items()), ""]
    lines.append("rpt COMMAND --help lists what can be set; rpt COMMAND --config FILE --print_config prints the whole configuration.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
