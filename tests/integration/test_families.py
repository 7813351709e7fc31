"""Model families with both engines do what docs/families.md says."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rpt_lightning.rollout.weight_sync.file_names import as_in_files, make_skeleton, names_in_files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import family_table  # noqa: E402

WORKING = {"phi", "olmo2", "smollm3", "starcoder2", "gpt2", "gpt_neox", "qwen3_moe", "mixtral"}
ROWS = re.compile(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", re.MULTILINE)


def page() -> dict[str, tuple[str, ...]]:
    """Return the cells of the table by family."""
    return {
        row[0]: row[1:] for row in ROWS.findall((ROOT / "docs" / "families.md").read_text(encoding="utf-8"))
    }


def test_the_page_has_every_family_and_those_that_were_asked_for_work() -> None:
    rows = page()
    assert set(rows) == set(family_table.FAMILIES)
    assert all(rows[family][1] == family_table.WORKS for family in WORKING)
    assert not [cell for row in rows.values() for cell in row if cell.startswith(("TRACEBACK", "WRONG"))]


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)
@pytest.mark.parametrize("family", list(family_table.FAMILIES))
def test_a_family_does_what_the_page_says(family: str) -> None:
    row = family_table.row_of(family)
    assert tuple(row.get(column, "-") for column in family_table.COLUMNS) == page()[family]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_neox", "gpt2", "llama"])
def test_weights_in_the_form_of_files_are_what_save_pretrained_writes(family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = AutoConfig.for_model(family, **family_table.FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    given = dict(as_in_files(model.named_parameters(), make_skeleton(config)))
    assert set(given) == set(written)
    assert all(torch.equal(given[name], tensor) for name, tensor in written.items())
    assert {name for names in names_in_files(make_skeleton(config)).values() for name in names} >= set(
        written
    )
