from __future__ import annotations

import inspect

import pytest
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningCLI

from rpt_lightning.compat import jsonargparse as compat


def test_a_namespace_is_known_by_its_name_and_holds_its_values_in_vars() -> None:
    parser = ArgumentParser()
    parser.add_argument("--one.two", type=int)
    parsed = parser.parse_args(["--one.two", "3"])
    assert compat.is_namespace(parsed), f"parse_args returns a {type(parsed).__name__}, not a Namespace"
    assert compat.is_namespace(vars(parsed)["one"]), "a nested configuration is no longer in vars()"
    assert vars(vars(parsed)["one"]) == {"two": 3}
    assert not compat.is_namespace({"one": 1})
    assert compat.is_namespace(Namespace())


def test_the_error_of_a_subcommand_names_its_parser() -> None:
    found = []

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> None:
            found.append(compat.failed_parser(ex, self))
            raise SystemExit(2)

    inner, outer = Parser(prog="inner"), Parser(prog="outer")
    inner.add_argument("--number", type=int)
    outer.add_subcommands().add_subcommand("verb", inner)
    with pytest.raises(SystemExit):
        outer.parse_args(["verb", "--number", "x"])
    assert found[-1] is inner, "ArgumentParser.error no longer gets an exception with subcommand_parser"
    assert compat.failed_parser(None, outer) is outer


def test_lightning_still_uses_the_former_name_of_instantiate() -> None:
    """`short_errors.ShortErrors` forwards it, to avoid a warning. If this fails, remove that method."""
    assert "parser.instantiate_classes(" in inspect.getsource(LightningCLI.instantiate_classes)
    assert callable(ArgumentParser.instantiate)
