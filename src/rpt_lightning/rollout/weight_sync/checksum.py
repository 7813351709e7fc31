"""A checksum to compare a server's weights with the policy's without sending them over the network."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> str:
    """Return the SHA-256 (hex) of dtype, shape and values.

    Two tensors have the same checksum if ``torch.equal`` holds for them. As there, 0 and -0 count as equal.

    >>> checksum(torch.tensor([0.0, 1.0])) == checksum(torch.tensor([-0.0, 1.0]))
    True
    >>> checksum(torch.tensor([0.0, 1.0])) == checksum(torch.tensor([[0.0, 1.0]]))
    False
    """
    # -0 + 0 = 0. Reading back a packed matrix loses the sign of zeros.
    values = (tensor.detach().to("cpu") + 0.0).contiguous()
    digest = hashlib.sha256(repr((values.dtype, tuple(values.shape))).encode())
    digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
