"""Only compat/ uses what other libraries call private. tests/compat checks each of its reliances."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "rpt_lightning"
COMPAT = PACKAGE / "compat"
# "file: name". Each is documented, or is no library's.
ALLOWED = {
    "training/callbacks/rank_watch.py: _exit",  # os._exit is in Python's documentation
}
_BUILT_IN = ("getattr", "hasattr", "setattr", "delattr")


def sources(folder: Path = PACKAGE) -> dict[str, ast.Module]:
    """Parse the files outside compat/."""
    return {
        str(path.relative_to(folder)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
        if COMPAT not in path.parents
    }


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[^_].*", name) is not None


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """The private names that the package itself defines: functions, classes, variables and attributes."""
    names: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                names.add(node.attr)
    return {name for name in names if is_private(name)}


def is_third_party(module: str) -> bool:
    root = module.split(".")[0]
    return root != "rpt_lightning" and root not in sys.stdlib_module_names


def imported_names(tree: ast.Module) -> set[str]:
    """The names under which a file knows other libraries, their modules and their members."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0] for alias in node.names if is_third_party(alias.name)
            }
        elif isinstance(node, ast.ImportFrom) and is_third_party(node.module or ""):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def private_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            paths = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            continue
        for path in paths:
            if is_third_party(path) and any(map(is_private, path.split("."))):
                yield node.lineno, path


def private_attributes(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Attributes that the package does not define itself, also as text for getattr and its like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in _BUILT_IN
            and isinstance(name := node.args[1], ast.Constant)
            and is_private(str(name.value))
            and name.value not in own
        ):
            yield node.lineno, str(name.value)


def hooks(trees: dict[str, ast.Module]) -> Iterator[tuple[str, int, str]]:
    """Private methods that the package never calls, which replace those of a library."""
    used = {
        node.attr
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    for file, tree in trees.items():
        for cls in ast.walk(tree):
            for node in cls.body if isinstance(cls, ast.ClassDef) else ():
                if isinstance(node, ast.FunctionDef) and is_private(node.name) and node.name not in used:
                    yield file, node.lineno, node.name


def patches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Assignments to an attribute of another library."""
    imported = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in imported:
                yield node.lineno, ast.unparse(node)


def reaches(trees: dict[str, ast.Module]) -> list[str]:
    own = own_names(trees)
    found = [
        (file, line, name)
        for file, tree in trees.items()
        for line, name in (*private_imports(tree), *private_attributes(tree, own), *patches(tree))
    ]
    return sorted(
        f"{file}:{line}: {name}"
        for file, line, name in [*found, *hooks(trees)]
        if f"{file}: {name}" not in ALLOWED
    )


def test_only_compat_reaches_into_libraries() -> None:
    found = reaches(sources())
    assert not found, (
        "a function in rpt_lightning/compat/ with a test in tests/compat/ shall do this:\n" + "\n".join(found)
    )


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from torch._dynamo import config", "torch._dynamo.config"),
        ("import torch._dynamo", "torch._dynamo"),
        ("from trl import _Trainer", "trl._Trainer"),
        ("import torch\nx = torch._dynamo.config", "_dynamo"),
        ("def f(model): return model.config._attn_implementation", "_attn_implementation"),
        ("class C:\n    def f(self): return self._trainer", "_trainer"),
        ("def f(w): return getattr(w, '_local_tensor', w)", "_local_tensor"),
        ("class C(Base):\n    def _set_seed(self): ...", "_set_seed"),
        ("import torch\ntorch.set_num_threads = print", "torch.set_num_threads"),
        ("from vllm.base import Base\nBase.step = None", "Base.step"),
    ],
)
def test_a_reach_is_found(code: str, name: str) -> None:
    assert [found.rpartition(": ")[2] for found in reaches({"file.py": ast.parse(code)})] == [name]


@pytest.mark.parametrize(
    "code",
    [
        "from vllm import __version__",
        "from rpt_lightning.data.store.shards import _helper",
        "import sys\nsys.stdout = None",
        "class C:\n    _running = None\n    def f(self, other): return other._running is C._running",
        "class C:\n    def __init__(self): self._x = 1\n    def f(self): return self._x",
        "class C:\n    def _f(self): return 1\n    def g(self): return self._f()",
    ],
)
def test_what_is_our_own_is_no_reach(code: str) -> None:
    assert reaches({"file.py": ast.parse(code)}) == []


def test_only_the_vllm_adapters_use_vllms_part_of_compat() -> None:
    users = {
        file
        for file, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rpt_lightning.compat.vllm")
    }
    assert users
    adapters = ("rollout/engines/vllm/", "rollout/weight_sync/nccl_transport.py")
    assert all(file.startswith(adapters) for file in users), sorted(users)


def test_every_function_of_compat_has_a_contract_test() -> None:
    tests = "\n".join(path.read_text() for path in (Path(__file__).parent / "compat").glob("test_*.py"))
    untested = [
        f"{path.relative_to(COMPAT)}: {node.name}"
        for path in sorted(COMPAT.rglob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not is_private(node.name)
        and not re.search(rf"\b{node.name}\b", tests)
    ]
    assert not untested, f"tests/compat/ names none of {untested}"
