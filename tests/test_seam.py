"""Only objectives know what kind of task, reward or prompt there is, and only data modules their own kind."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "rpt_lightning"
# An objective's leaves, and what they are made of.
LEAVES = ("objectives",)
KINDS = {
    "TokenTask", "AnswerTask", "Question", "Objective", "NextTokenObjective", "QuestionObjective", "Reward",
    "NextSegmentObjective", "NextSentenceObjective", "AboutSentences", "SegmentReward", "SegmentJudge",
    "PrefixMatchReward", "FirstTokenReward", "DenseReward", "ConditionalDenseReward", "AnswerReward",
    "PromptTemplate", "ContinuationPrompt", "ChatPrompt", "QuestionPrompt", "StreamDataModule",
    "TaskFolderDataModule", "TokenTaskDataModule", "AnswerTaskDataModule", "TextDataModule",
    "TraceDataModule", "CorpusDataModule", "MixedDataModule",
}  # fmt: skip


def asked_kinds(tree: ast.AST) -> set[str]:
    """Return the names that stand in a call of isinstance or issubclass, or in a match statement."""
    found = set()
    for node in ast.walk(tree):
        asked = (
            node.args[1:]
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass")
            else [node.cls]
            if isinstance(node, ast.MatchClass)
            else []
        )
        for part in asked:
            found |= {
                getattr(name, "id", None) or getattr(name, "attr", "")
                for name in ast.walk(part)
                if isinstance(name, (ast.Name, ast.Attribute))
            }
    return found


def test_nothing_outside_the_leaves_asks_for_a_kind():
    asking = {
        str(path.relative_to(SOURCE)): asked_kinds(ast.parse(path.read_text(encoding="utf-8"))) & KINDS
        for path in sorted(SOURCE.rglob("*.py"))
        if path.relative_to(SOURCE).parts[0] not in LEAVES
    }
    assert {path: kinds for path, kinds in asking.items() if kinds} == {}


def test_the_search_finds_what_it_looks_for():
    for code in (
        "isinstance(task, TokenTask)",
        "isinstance(x, (int, types.AnswerTask))",
        "isinstance(x, A | DenseReward)",
        "match x:\n    case QuestionPrompt():\n        pass",
    ):
        assert asked_kinds(ast.parse(code)) & KINDS
    assert not asked_kinds(ast.parse("isinstance(x, int); TokenTask()")) & KINDS
