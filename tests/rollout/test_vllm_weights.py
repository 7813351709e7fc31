"""Reading from stand-ins for vLLM's layers, with the same names and fields.

Tests with the real engine cover reading from several devices and kernels.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rpt_lightning.rollout.engines.vllm.weights import read_weights

VOCABULARY, PADDED, WIDTH = 5, 7, 8


class VocabParallelEmbedding(nn.Module):
    """A table with padded rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(PADDED * WIDTH, dtype=torch.float32).view(PADDED, WIDTH))
        self.org_vocab_size, self.embedding_dim, self.tp_size = VOCABULARY, WIDTH, 1


class ParallelLMHead(VocabParallelEmbedding):
    """A head without its plain tensor, as on a CPU, where only the kernel has it."""

    def __init__(self) -> None:
        super().__init__()
        packed = self.weight.detach().clone()
        self.num_columns: list[int] = []
        self.weight = nn.Parameter(torch.empty(0))

        def kernel(inputs: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
            self.num_columns.append(len(inputs))
            return inputs @ packed.t()

        self.cpu_linear = kernel


@pytest.mark.parametrize("layer", [VocabParallelEmbedding, ParallelLMHead])
def test_columns_of_a_padded_vocabulary(layer: type[VocabParallelEmbedding]) -> None:
    model = nn.ModuleDict({"end": layer()})
    whole = torch.arange(PADDED * WIDTH, dtype=torch.float32).view(PADDED, WIDTH)[:VOCABULARY]
    held = read_weights(model, ["end.weight", "end.weight[:, 2:5]", "end.weight[:, 7:8]"], torch.float32)
    assert torch.equal(held["end.weight"], whole)
    assert torch.equal(held["end.weight[:, 2:5]"], whole[:, 2:5])
    assert torch.equal(held["end.weight[:, 7:8]"], whole[:, 7:8])
    assert all(part.is_contiguous() for part in held.values())
    if layer is ParallelLMHead:
        assert model["end"].num_columns == [WIDTH, 3, 1]  # the kernel gets nothing else
