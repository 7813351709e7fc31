"""The checksum by which a server's weights are compared with the policy's, without sending them over the network."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> str:
    """SHA-256 (hex) of dtype, shape and values. Two tensors have the same one where ``torch.equal`` holds: 0 and -0 count as equal here too.

    >>> checksum(torch.tensor([0.0, 1.0])) == checksum(torch.tensor([-0.0, 1.0]))
    True
    >>> checksum(torch.tensor([0.0, 1.0])) == checksum(torch.tensor([[0.0, 1.0]]))
    False
    """
    values = (
        tensor.detach().to("cpu") + 0.0
    ).contiguous()  # -0 + 0 = 0: reading a packed matrix back loses the sign of zeros
    digest = hashlib.sha256(repr((values.dtype, tuple(values.shape))).encode())
    digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
