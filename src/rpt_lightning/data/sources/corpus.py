"""Sources of text. A source yields the same documents in the same order every time."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import types
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from rpt_lightning.data.sources.data_files import find_files, read_text
from rpt_lightning.data.sources.fields import row_fields
from rpt_lightning.data.sources.hub_rows import read_dataset
from rpt_lightning.data.sources.jsonl import read_records
from rpt_lightning.data.sources.parquet_rows import read_parquet
from rpt_lightning.data.sources.row_text import DEFAULT_SEPARATOR, fill_template
from rpt_lightning.types import Document

DEFAULT_TEMPLATE = "{problem}\n\n{solution}"


class CorpusSource(ABC):
    """A text corpus."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield all documents in a fixed order.

        Raises ValueError that names the file, line or field at fault.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe the source for the manifest: its kind and settings, in JSON types."""


class JsonlSource(CorpusSource):
    """A corpus of JSON lines, one object per line.

    ``template`` says how an object's fields become the text. ``fields`` says which of them are kept with it.

    Args:
        path: A file, a folder of files, or a pattern. Files may be compressed. A ``.json`` file may hold one
            list of objects.
        template: Text in which names in braces are fields. A dot leads into nested values:
            ``{messages.0.content}``.
        fields: Names of the fields to keep, to break accuracy down by them. A dot leads into nested values.
        separator: Text to put between the texts of a field that is a list of them.
    """

    def __init__(
        self,
        path: str,
        template: str = DEFAULT_TEMPLATE,
        fields: list[str] = [],  # noqa: B006, is never changed
        separator: str = DEFAULT_SEPARATOR,
    ) -> None:
        self.path = path
        self.template = template
        self.fields = fields
        self.separator = separator

    def documents(self) -> Iterator[Document]:
        for record in read_records(self.path, name=_path_flag(self.path)):
            text = fill_template(self.template, record.value, where=record.where, separator=self.separator)
            fields = row_fields(self.fields, record.value, where=record.where)
            yield Document(doc_id=f"{record.file.name}:{record.number}", text=text, fields=fields)

    def describe(self) -> dict[str, Any]:
        return {"kind": "jsonl", "path": str(self.path), "template": self.template} | _told(
            self.fields, self.separator
        )


class ParquetSource(CorpusSource):
    """The rows of Parquet files. The columns named by ``fields`` are kept with the text.

    Args:
        path: A file, a folder of files, or a pattern.
        template: Text in which names in braces are columns. A dot leads into nested values:
            ``{messages.0.content}``.
        fields: Names of the columns to keep, to break accuracy down by them. A dot leads into nested values.
        separator: Text to put between the texts of a column that holds lists of them.
    """

    def __init__(
        self,
        path: str,
        template: str = DEFAULT_TEMPLATE,
        fields: list[str] = [],  # noqa: B006, is never changed
        separator: str = DEFAULT_SEPARATOR,
    ) -> None:
        self.path = path
        self.template = template
        self.fields = fields
        self.separator = separator

    def documents(self) -> Iterator[Document]:
        for file, number, row in read_parquet(self.path, name=_path_flag(self.path)):
            where = f"{file.path}, row {number} (from 0)"
            text = fill_template(self.template, row, where=where, separator=self.separator)
            yield Document(
                doc_id=f"{file.name}:{number}", text=text, fields=row_fields(self.fields, row, where=where)
            )

    def describe(self) -> dict[str, Any]:
        return {"kind": "parquet", "path": str(self.path), "template": self.template} | _told(
            self.fields, self.separator
        )


class TextFilesSource(CorpusSource):
    """The files that match ``pattern``, each of them one document, in the order of their paths.

    Args:
        pattern: A file, a folder (all files in it, at any depth) or a pattern, which may contain ``**``.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def documents(self) -> Iterator[Document]:
        for file in find_files(self.pattern, name=f"--source.init_args.pattern {self.pattern!r}", endings=()):
            yield Document(doc_id=str(file.path), text=read_text(file.path, name=str(file.path)))

    def describe(self) -> dict[str, Any]:
        return {"kind": "text_files", "pattern": self.pattern}


class HuggingFaceSource(CorpusSource):
    """A split of a Hugging Face dataset. The columns named by ``fields`` are kept with the text.

    It needs ``pip install 'rpt-lightning[datasets]'``.

    Args:
        name: Hub id, or a folder that `datasets` reads.
        split: Split of the dataset.
        template: Text in which names in braces are fields. A dot leads into nested values:
            ``{messages.0.content}``.
        config_name: Configuration of the dataset, if it has several.
        revision: Commit to read.
        fields: Names of the columns to keep, to break accuracy down by them. A dot leads into nested values.
        separator: Text to put between the texts of a field that is a list of them.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        template: str = DEFAULT_TEMPLATE,
        config_name: str | None = None,
        revision: str | None = None,
        fields: list[str] = [],  # noqa: B006, is never changed
        separator: str = DEFAULT_SEPARATOR,
    ) -> None:
        self.name = name
        self.split = split
        self.template = template
        self.config_name = config_name
        self.revision = revision
        self.fields = fields
        self.separator = separator

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(
            read_dataset(self.name, self.config_name, split=self.split, revision=self.revision)
        ):
            where = f"dataset {self.name}, split {self.split}, row {number} (from 0)"
            text = fill_template(self.template, row, where=where, separator=self.separator)
            yield Document(
                doc_id=f"{self.name}/{self.split}:{number}",
                text=text,
                fields=row_fields(self.fields, row, where=where),
            )

    def describe(self) -> dict[str, Any]:
        described = {
            "kind": "hugging_face",
            "name": self.name,
            "config_name": self.config_name,
            "split": self.split,
            "revision": self.revision,
        }
        return described | {"template": self.template} | _told(self.fields, self.separator)


class DocstringSource(CorpusSource):
    """Docstrings of an installed package's public classes, functions and methods.

    They are real text that is available on any machine. Each object counts once, under the name where it was
    defined, however often it is imported elsewhere. Docstrings come from the object itself, because
    ``inspect.getdoc`` would repeat a base class's text for every subclass. Modules that fail to import
    (optional dependencies) are skipped and counted.
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
                f"--source.init_args.package {self.package!r} cannot be imported ({error}); "
                "install it or name another package"
            ) from error
        # The keys are identities. The values keep the objects alive, so that identities stay unique.
        objects: dict[int, tuple[str, object]] = {}
        for module in self._modules(root):
            for name, member in sorted(vars(module).items()):
                if not name.startswith("_"):
                    self._collect(member, objects)
        if self.num_skipped_modules:
            print(
                f"{self.num_skipped_modules} modules of {self.package} cannot be imported here "
                "and are left out",
                flush=True,
            )
        seen: dict[str, int] = {}
        for name, member in sorted(objects.values(), key=lambda pair: pair[0]):
            text = inspect.cleandoc(member.__doc__ or "")
            if len(text) < self.min_chars:
                continue
            seen[name] = seen.get(name, 0) + 1
            yield Document(doc_id=name if seen[name] == 1 else f"{name}#{seen[name]}", text=text)

    def describe(self) -> dict[str, Any]:
        version = getattr(importlib.import_module(self.package), "__version__", None)
        return {
            "kind": "docstrings",
            "package": self.package,
            "version": version,
            "min_chars": self.min_chars,
        }

    def _modules(self, root: types.ModuleType) -> list[types.ModuleType]:
        """Return the package's public modules by name. Its tests and benchmarks hold no prose."""
        self.num_skipped_modules = 0
        modules = [root]
        # Some modules print when they are imported (sympy.this).
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
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
        return [
            f"{module.__name__}.{name}"
            for name in names
            if not name.startswith("_") and name not in ("tests", "benchmarks", "conftest")
        ]

    def _collect(self, member: object, objects: dict[int, tuple[str, object]]) -> None:
        member = _unwrapped(member)
        name = f"{getattr(member, '__module__', '')}.{getattr(member, '__qualname__', '')}"
        if (
            not (inspect.isclass(member) or inspect.isfunction(member))
            or not name.startswith(self.package + ".")
            or id(member) in objects
        ):
            return
        # <locals> and <lambda> have no name of their own.
        if "<" not in name and isinstance(member.__doc__, str):
            objects[id(member)] = (name, member)
        if inspect.isclass(member):
            for attribute, value in sorted(vars(member).items()):
                if not attribute.startswith("_"):
                    self._collect(value, objects)


def _unwrapped(member: object) -> object:
    """Return the function behind a property, class method, static method or cache."""
    if isinstance(member, property):
        member = member.fget
    if isinstance(member, (classmethod, staticmethod)):
        member = member.__func__
    try:
        return inspect.unwrap(member)  # type: ignore[arg-type]
    except (Exception, SystemExit):  # objects that answer to any attribute, such as symbolic expressions
        return member


def _path_flag(path: str) -> str:
    return f"--source.init_args.path {str(path)!r}"


def _told(fields: Sequence[str], separator: str) -> dict[str, Any]:
    """Describe the fields and the separator.

    Defaults are omitted, so that the description equals that from before these options existed.
    """
    return ({"fields": list(fields)} if fields else {}) | (
        {} if separator == DEFAULT_SEPARATOR else {"separator": separator}
    )
