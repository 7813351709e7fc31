"""Divide the matrices of layers over several devices (Megatron-LM, arXiv:1909.08053).

The plan is the one that transformers has for the family. It divides attention heads and the inner units of
the MLP. Every device of the group computes in full what lies between these, as well as the embeddings and the
head. This is exact and needs no collective of its own. Dividing the head over the vocabulary would save
memory and time, but is not implemented.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from rpt_lightning.compat.transformers import layer_plan
from rpt_lightning.policy.model import Policy


def _replicate(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let every device hold all of the module's weights and compute all of it.

    It makes all weights of the model tensors of one mesh.
    """

    def replicate(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
        for parameter_name, parameter in part.named_parameters(recurse=False):
            replicated = DTensor.from_local(parameter.detach(), mesh, [Replicate()], run_check=False)
            part.register_parameter(parameter_name, nn.Parameter(replicated))

    def enter(part: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
        return tuple(
            DTensor.from_local(x, mesh, [Replicate()], run_check=False) if isinstance(x, Tensor) else x
            for x in inputs
        )

    def leave(part: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
        return outputs.to_local()

    distribute_module(module, mesh, replicate, enter, leave)


STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    # Norms of single heads. A device has some of the heads, so the weight's gradient is the sum over devices.
    # Heads are dimension 2.
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}


def parallelize(policy: Policy, mesh: DeviceMesh) -> None:
    """Divide the layers over the mesh. Do nothing if the mesh has one device.

    Raises:
        ValueError: The policy has an adapter, the family has no plan, its plan needs a style that is not in
            ``STYLES``, or its heads cannot be divided.
    """
    if mesh.size() == 1:
        return
    model, flag = policy.model, f"tensor_parallel_size={mesh.size()}"
    if policy.adapter is not None:
        raise ValueError(
            f"{flag}: model.policy.adapter is not supported with tensor parallelism; set "
            "trainer.strategy.tensor_parallel_size to 1"
        )
    plan = layer_plan(policy.config)
    unknown = sorted(set(plan.values()) - STYLES.keys())
    if not plan or unknown:
        raise ValueError(
            f"{flag}: {type(model).__name__} has {f'a plan with {unknown}' if plan else 'no plan'} for "
            "tensor parallelism, which is not supported; set it to 1, or use a "
            "dense model of the Llama, Qwen2 or Qwen3 family"
        )
    sizes = {
        name: getattr(policy.config, name)
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    uneven = {name: size for name, size in sizes.items() if size % mesh.size()}
    if uneven:
        raise ValueError(
            f"{flag}: {policy.path} has {uneven}, which cannot be divided by "
            f"{mesh.size()}; choose a divisor of all of them"
        )
    base: nn.Module = model.base_model
    is_tied = policy.is_tied
    parallelize_module(base, mesh, {name: STYLES[style]() for name, style in plan.items()})
    for module in list(model.modules()):
        if any(not isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
            _replicate(module, mesh)
    if is_tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight  # type: ignore[no-untyped-call]
