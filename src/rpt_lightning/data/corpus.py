"""Where text comes from. A source yields the same documents in the same order every time."""

from __future__ import annotations

import contextlib
import glob
import importlib
import inspect
import io
import pkgutil
import string
import types
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpt_lightning.data.fields import value_problem
from rpt_lightning.data.jsonl import read_jsonl
from rpt_lightning.types import Document, FieldValue

DEFAULT_TEMPLATE = "{problem}\n\n{solution}"


class CorpusSource(ABC):
    """A text corpus."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, in a fixed order. Raises ValueError that names the file, line or field at fault."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the manifest says about the source: its kind and settings, in JSON types."""


def fill_template(template: str, row: Mapping[str, Any], *, where: str) -> str:
    """The text of one record.

    >>> fill_template("{problem} = {solution}", {"problem": "1 + 1", "solution": 2}, where="a.jsonl, line 1")
    '1 + 1 = 2'
    """
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    missing = [name for name in fields if row.get(name) is None]
    if missing:
        raise ValueError(
            f"{where}: the template {template!r} needs the field {missing[0]!r}, missing or null there (fields: {', '.join(map(str, row))}); "
            "correct --source.init_args.template or the data"
        )
    return template.format_map(row)


def row_fields(names: Sequence[str], row: Mapping[str, Any], *, where: str) -> dict[str, FieldValue]:
    """The columns of one record that are kept as fields of the document. Raises ValueError that begins with ``where``.

    >>> row_fields(["depth"], {"text": "...", "depth": 3}, where="a.jsonl, line 1")
    {'depth': 3}
    """
    for name in names:
        if row.get(name) is None:
            raise ValueError(
                f"{where}: the field {name!r} is to be kept, and is missing or null there (fields: {', '.join(map(str, row))}); correct "
                "--source.init_args.fields or the data"
            )
        problem = value_problem(row[name])
        if problem:
            raise ValueError(
                f"{where}: the field {name!r} is to be kept, so it must be text or a finite number, and {problem}; correct --source.init_args.fields or "
                "the data"
            )
    return {name: row[name] for name in names}


def _kept(fields: Sequence[str]) -> dict[str, list[str]]:
    """What a description says of them: nothing where there are none, as before there could be any."""
    return {"fields": list(fields)} if fields else {}


class JsonlSource(CorpusSource):
    """One JSON object a line; ``template`` says how its fields become the text, and ``fields`` which of them are kept beside it."""

    def __init__(self, path: str, template: str = DEFAULT_TEMPLATE, fields: list[str] = []) -> None:  # noqa: B006, is never changed
        self.path = Path(path)
        self.template = template
        self.fields = fields

    def documents(self) -> Iterator[Document]:
        _require_file(self.path)
        for number, row in read_jsonl(self.path, name=str(self.path)):
            where = f"{self.path}, line {number}"
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a {type(row).__name__} where an object with the template's fields belongs")
            text, fields = fill_template(self.template, row, where=where), row_fields(self.fields, row, where=where)
            yield Document(doc_id=f"{self.path.name}:{number}", text=text, fields=fields)

    def describe(self) -> dict[str, Any]:
        return {"kind": "jsonl", "path": str(self.path), "template": self.template} | _kept(self.fields)


class ParquetSource(CorpusSource):
    """The rows of a Parquet file; columns named by ``fields`` are kept beside the text."""

    def __init__(self, path: str, template: str = DEFAULT_TEMPLATE, fields: list[str] = []) -> None:  # noqa: B006, is never changed
        self.path = Path(path)
        self.template = template
        self.fields = fields

    def documents(self) -> Iterator[Document]:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        _require_file(self.path)
        try:
            file = ParquetFile(self.path)
        except ArrowInvalid as error:
            raise ValueError(f"{self.path}: not a readable Parquet file ({error})") from error
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                where = f"{self.path}, row {number} (from 0)"
                text, fields = fill_template(self.template, row, where=where), row_fields(self.fields, row, where=where)
                yield Document(doc_id=f"{self.path.name}:{number}", text=text, fields=fields)
                number += 1

    def describe(self) -> dict[str, Any]:
        return {"kind": "parquet", "path": str(self.path), "template": self.template} | _kept(self.fields)


class TextFilesSource(CorpusSource):
    """Every file that matches ``pattern`` (``**`` allowed) is a document, in the order of the paths."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def documents(self) -> Iterator[Document]:
        paths = sorted(path for path in glob.glob(self.pattern, recursive=True) if Path(path).is_file())
        if not paths:
            raise ValueError(f"--source.init_args.pattern {self.pattern!r} matches no file")
        for path in paths:
            try:
                text = Path(path).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 (byte {error.start}); convert the file or narrow --source.init_args.pattern") from error
            yield Document(doc_id=path, text=text)

    def describe(self) -> dict[str, Any]:
        return {"kind": "text_files", "pattern": self.pattern}


class HuggingFaceSource(CorpusSource):
    """A split of a Hugging Face dataset (``pip install 'rpt-lightning[datasets]'``). ``revision`` pins a commit; columns named by ``fields`` are kept
    beside the text."""

    def __init__(
        self,
        name: str,
        split: str = "train",
        template: str = DEFAULT_TEMPLATE,
        config_name: str | None = None,
        revision: str | None = None,
        fields: list[str] = [],  # noqa: B006, is never changed
    ) -> None:
        self.name = name
        self.split = split
        self.template = template
        self.config_name = config_name
        self.revision = revision
        self.fields = fields

    def documents(self) -> Iterator[Document]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError("HuggingFaceSource needs the datasets package: pip install 'datasets>=3'") from error
        for number, row in enumerate(load_dataset(self.name, self.config_name, split=self.split, revision=self.revision)):
            where = f"dataset {self.name}, split {self.split}, row {number} (from 0)"
            text, fields = fill_template(self.template, row, where=where), row_fields(self.fields, row, where=where)
            yield Document(doc_id=f"{self.name}/{self.split}:{number}", text=text, fields=fields)

    def describe(self) -> dict[str, Any]:
        settings = {"name": self.name, "config_name": self.config_name, "split": self.split, "revision": self.revision, "template": self.template}
        return {"kind": "hugging_face"} | settings | _kept(self.fields)


class DocstringSource(CorpusSource):
    """Docstrings of an installed package's public classes, functions and methods: real text on any machine.

    Each object counts once, under the name where it was defined, however often it is imported elsewhere. Docstrings come from the object itself:
    ``inspect.getdoc`` would repeat a base class's text for every subclass. Modules that fail to import (optional dependencies) are skipped and counted.
    """

    def __init__(self, package: str = "sympy", min_chars: int = 200) -> None:
        self.package = package
        self.min_chars = min_chars
        self.num_skipped_modules = 0

    def documents(self) -> Iterator[Document]:
        try:
            root = importlib.import_module(self.package)
        except ImportError as error:
            raise ValueError(
                f"--source.init_args.package {self.package!r} cannot be imported ({error}); install it or name another package"
            ) from error
        objects: dict[int, tuple[str, object]] = {}  # by identity; the objects stay referenced, so that identities stay unique
        for module in self._modules(root):
            for name, member in sorted(vars(module).items()):
                if not name.startswith("_"):
                    self._collect(member, objects)
        if self.num_skipped_modules:
            print(f"{self.num_skipped_modules} modules of {self.package} do not import here and are left out", flush=True)
        seen: dict[str, int] = {}
        for name, member in sorted(objects.values(), key=lambda pair: pair[0]):
            text = inspect.cleandoc(member.__doc__ or "")
            if len(text) < self.min_chars:
                continue
            seen[name] = seen.get(name, 0) + 1
            yield Document(doc_id=name if seen[name] == 1 else f"{name}#{seen[name]}", text=text)

    def describe(self) -> dict[str, Any]:
        version = getattr(importlib.import_module(self.package), "__version__", None)
        return {"kind": "docstrings", "package": self.package, "version": version, "min_chars": self.min_chars}

    def _modules(self, root: types.ModuleType) -> list[types.ModuleType]:
        """The package's public modules by name; its own tests and benchmarks hold no prose."""
        self.num_skipped_modules = 0
        modules = [root]
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # some modules print when they are imported (sympy.this)
            warnings.simplefilter("ignore")
            pending = sorted(self._submodule_names(root))
            while pending:
                name = pending.pop(0)
                try:
                    module = importlib.import_module(name)
                except (Exception, SystemExit):
                    self.num_skipped_modules += 1
                    continue
                modules.append(module)
                pending = sorted([*pending, *self._submodule_names(module)])
        return modules

    @staticmethod
    def _submodule_names(module: types.ModuleType) -> list[str]:
        names = [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", None) or [])]
        return [f"{module.__name__}.{name}" for name in names if not name.startswith("_") and name not in ("tests", "benchmarks", "conftest")]

    def _collect(self, member: object, objects: dict[int, tuple[str, object]]) -> None:
        member = _unwrapped(member)
        name = f"{getattr(member, '__module__', '')}.{getattr(member, '__qualname__', '')}"
        if not (inspect.isclass(member) or inspect.isfunction(member)) or not name.startswith(self.package + ".") or id(member) in objects:
            return
        if "<" not in name and isinstance(member.__doc__, str):  # <locals> and <lambda> have no name of their own
            objects[id(member)] = (name, member)
        if inspect.isclass(member):
            for attribute, value in sorted(vars(member).items()):
                if not attribute.startswith("_"):
                    self._collect(value, objects)


def _unwrapped(member: object) -> object:
    """The function behind a property, class method, static method or cache."""
    if isinstance(member, property):
        member = member.fget
    if isinstance(member, (classmethod, staticmethod)):
        member = member.__func__
    try:
        return inspect.unwrap(member)  # type: ignore[arg-type]
    except (Exception, SystemExit):  # objects that answer every attribute, such as symbolic expressions
        return member


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"--source.init_args.path {str(path)!r}: there is no such file")
