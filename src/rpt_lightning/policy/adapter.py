"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): a layer computes x W^T + s (x A^T) B^T.

W is frozen, and only A [r, in] and B [out, r] are trained. s is alpha / r, or alpha / sqrt(r) with rsLoRA
(Kalajdzievski 2023, arXiv:2312.03732). peft supplies the layers. This module decides which layers get one and
how they start, and computes merged weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rpt_lightning.compat.peft import BASE, adapted_layers, inject, part_names, parts
from rpt_lightning.compat.torch import map_tensors
from rpt_lightning.compat.transformers import converts_weights
from rpt_lightning.flag_bounds import check_number
from rpt_lightning.policy.exact_products import exact_products
from rpt_lightning.pretrained.adapter_folder import AdapterFolder
from rpt_lightning.pretrained.weights import some


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A low-rank adapter that is trained instead of the policy's own weights.

    There is no dropout, because engine and policy must agree and log-probs must be exact.

    Args:
        rank: Rank r of the update s B A of each matrix.
        alpha: Size of the update: s is alpha / rank.
        targets: Last names of the linear layers that get an adapter, such as [q_proj, v_proj]. "all-linear"
            means all except the output head.
        rslora: Let s be alpha / sqrt(rank), so that the rank hardly changes the best learning rate.
        base_dtype: Data type in which the frozen matrices are held. "bfloat16" takes half the memory. It
            needs a model folder in bf16 and --trainer.precision bf16-mixed, and then changes no result.
    """

    rank: int = 32
    alpha: float = 32.0
    targets: list[str] | Literal["all-linear"] = "all-linear"
    rslora: bool = False
    base_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_number("model.policy.adapter.rank", self.rank, least=1)
        check_number("model.policy.adapter.alpha", self.alpha, above=0, below=math.inf)
        if not self.targets:
            raise ValueError(
                'model.policy.adapter.targets=[]: name at least one layer, such as [q_proj], or "all-linear"'
            )

    @property
    def scale(self) -> float:
        """The factor s of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def about(self) -> dict[str, Any]:
        """Return what a checkpoint says about it."""
        return asdict(self)


def target_names(
    model: PreTrainedModel, targets: list[str] | Literal["all-linear"], *, where: str
) -> tuple[str, ...]:
    """Return the last names of the layers that get an adapter, in alphabetical order.

    Raises:
        ValueError: A target is no linear layer of the model, or the model has experts. ``where`` begins the
            message.
    """
    if converts_weights(model) or any(parameter.ndim > 2 for parameter in model.parameters()):
        raise ValueError(
            f"{where}: model.policy.adapter is not supported for {type(model).__name__}, because its files "
            "hold other matrices than its layers (a mixture of experts does); leave the adapter out, or use "
            "a dense model of the Llama, Qwen2 or Qwen3 family"
        )
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not linear:
        raise ValueError(
            f"{where}: model.policy.adapter: {type(model).__name__} has no nn.Linear layers; use "
            "a dense model of the Llama, Qwen2 or Qwen3 family"
        )
    if targets == "all-linear":
        return tuple(sorted(linear))
    others = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear) or module is head
    }
    if unknown := sorted(set(targets) - (linear - others)):
        raise ValueError(
            f"{where}: model.policy.adapter.targets: {', '.join(unknown)}: no linear layer of "
            f"{type(model).__name__} is called that. It has {', '.join(sorted(linear - others))}. An adapter "
            "of the embedding or the head is not supported"
        )
    return tuple(sorted(set(targets)))


def add_adapter(model: PreTrainedModel, adapter: Adapter, *, where: str) -> None:
    """Give the model's layers an adapter, whose values `start_adapter` sets, and freeze all else.

    The adapter's weights are fp32 and on the meta device.

    Raises:
        ValueError: See `target_names`.
    """
    targets = target_names(model, adapter.targets, where=where)
    wanted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }
    inject(model, rank=adapter.rank, alpha=adapter.alpha, targets=targets, rslora=adapter.rslora)
    got = adapted_layers(model).keys()
    assert got == wanted, f"peft gave {some(got ^ wanted)} layers more or less an adapter"
    for layer in adapted_layers(model).values():
        for part in (layer.lora_A, layer.lora_B):
            map_tensors(part, lambda tensor: tensor.float())


@torch.no_grad()
def start_adapter(
    model: nn.Module, *, seed: int, given: Mapping[str, Tensor] | None = None, where: str
) -> None:
    """Set the values of A and B, of shards too. Every rank must give the same arguments.

    Args:
        model: A model with an adapter that has storage.
        seed: Seed of A. Each A has its own numbers, which depend on the seed and the layer's name alone, so
            they are the same for any number of ranks and devices. B is 0.
        given: The values themselves, by parameter names, instead of A from the seed and B = 0.
        where: Begins the message.

    Raises:
        ValueError: ``given`` holds other layers or shapes.
    """
    own: dict[str, nn.Parameter] = {}
    for name, layer in adapted_layers(model).items():
        _, a, b, _ = parts(layer)
        own.update(zip(part_names(name), (a, b), strict=True))
    if given is not None:
        _check_given(given, own, where=where)
    for name, parameter in own.items():
        if given is not None:
            value = given[name]
        elif ".lora_B." in name:
            value = torch.zeros(parameter.shape)
        else:
            value = _first_a(parameter.shape, seed=seed, name=name)
        parameter.copy_(as_shard(value, parameter))


def _check_given(given: Mapping[str, Tensor], own: Mapping[str, Tensor], *, where: str) -> None:
    wrong = given.keys() ^ own.keys() or {name for name in own if given[name].shape != own[name].shape}
    if wrong:
        raise ValueError(
            f"{where}: the adapter's tensors are not those of the model's layers: {some(wrong)} are missing, "
            "unknown or of another shape; give the adapter's own base and settings"
        )


def _first_a(shape: torch.Size, *, seed: int, name: str) -> Tensor:
    """Draw A uniformly in +-1/sqrt(in), as in the authors' code, which draws as a linear layer does."""
    own_seed = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(own_seed))


def as_shard(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a tensor that a parameter has on this rank, on the parameter's device.

    No rank communicates: each has the whole tensor.
    """
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    mesh = parameter.device_mesh
    shard = distribute_tensor(
        whole.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None
    ).to_local()
    return DTensor.from_local(
        shard.to(parameter.to_local().device),
        mesh,
        parameter.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def base_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters without those of an adapter, under the names that they have without one."""
    own = (
        {name for layer in adapted_layers(model) for name in part_names(layer)} if has_adapter(model) else ()
    )
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        if name not in own:
            yield name.replace(BASE, "."), parameter


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield A and B of all layers under the names that they have among the model's parameters."""
    for name, layer in adapted_layers(model).items() if has_adapter(model) else ():
        _, a, b, _ = parts(layer)
        yield from zip(part_names(name), (a, b), strict=True)


def has_adapter(model: nn.Module) -> bool:
    """Whether the model has an adapter."""
    return hasattr(model, "peft_config")


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute W + s B A in fp32, in this order: the product, the factor, the sum.

    Args:
        weight: W, ``[out, in]``.
        a: A, ``[r, in]``.
        b: B, ``[out, r]``.
        scale: s.
    """
    with exact_products(), torch.autocast(weight.device.type, enabled=False):
        return (b.float() @ a.float()).mul_(scale).add_(weight.float())


@torch.no_grad()
def merge_folder(model: PreTrainedModel, folder: AdapterFolder) -> None:
    """Add an adapter to the weights of a model without one, of shards too.

    Raises:
        ValueError: The adapter does not fit the model.
    """
    where, tensors = f"policy.path={folder.path}", folder.tensors()
    weights = dict(model.named_parameters())
    layers = {name.partition(".lora_")[0] for name in tensors}
    names = {name for layer in layers for name in part_names(layer)}
    wrong = tensors.keys() ^ names or {f"{name}.weight" for name in layers} - weights.keys()
    if not wrong:
        for layer in layers:
            a, b = (tensors[name] for name in part_names(layer))
            if (b.shape[0], a.shape[1]) != weights[f"{layer}.weight"].shape or a.shape[0] != b.shape[1]:
                wrong = {layer}
    if wrong:
        raise ValueError(
            f"{where}: the adapter's tensors are not those of its base {folder.base}: {some(wrong)} are "
            "missing, unknown or of another shape; correct base_model_name_or_path in its adapter_config.json"
        )
    for layer in sorted(layers):
        weight = weights[f"{layer}.weight"]
        a, b = (tensors[name] for name in part_names(layer))
        if isinstance(weight, DTensor):
            update = merged(torch.zeros(weight.shape), a, b, folder.scale)
            weight.add_(as_shard(update, weight))
        else:
            weight.copy_(merged(weight, a.to(weight.device), b.to(weight.device), folder.scale))


def bf16_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that `Adapter.base_dtype` means: the frozen matrices, but no embedding.

    With bf16-mixed they are cast to bf16 wherever they are used, so holding them in bf16 changes no result.
    An embedding is not cast, and neither is a head that is tied to it.
    """
    embedding = cast(Any, model).get_input_embeddings().weight
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and module.weight is not embedding
    }


@torch.no_grad()
def hold_in_bf16(model: PreTrainedModel, *, where: str) -> None:
    """Replace the frozen matrices by their values in bf16.

    Raises:
        ValueError: A value is not a bf16 number, so this would change the model.
    """
    for name in sorted(bf16_names(model)):
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        whole = layer.weight
        rounded = whole.to(torch.bfloat16)
        if not whole.is_meta and not torch.equal(rounded.float(), whole):
            raise ValueError(not_bf16_message(name, where=where))
        layer.weight = nn.Parameter(rounded, requires_grad=False)


def not_bf16_message(name: str, *, where: str) -> str:
    """Return the message for a folder that bf16 cannot hold."""
    return (
        f"{where}: model.policy.adapter.base_dtype=bfloat16 would round the weights of this folder "
        f"({name.replace(BASE, '.')}), which are not in bf16; export it with --dtype bfloat16, or leave "
        "base_dtype at float32"
    )
