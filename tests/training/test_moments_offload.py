"""Moments in host memory give the same weights and checkpoints, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from small_run import flat_weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rpt_lightning.training.checkpoint.callback import last_checkpoint
from rpt_lightning.training.modules.moments_offload import MomentsOffload

CPU = torch.device("cpu")


class Watched(MomentsOffload):
    """Notes at each step whether the state is outside of its buffers."""

    def __init__(self, optimizer, **options):
        super().__init__(optimizer, **options)
        self.outside = []
        optimizer.register_step_pre_hook(lambda *_: self.outside.append(self._are_outside()))
        optimizer.register_step_post_hook(lambda *_: self.outside.append(self._are_outside()))

    def _are_outside(self):
        return [state[name] is not self._buffers.get((p, name)) for (p, name), state in self._entries()]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in [(7, 5), (3,), (1,), (2, 3, 4)]
    ]


def steps(optimizer, weights, number=4):
    generator = torch.Generator().manual_seed(1)
    for step in range(number):
        for index, weight in enumerate(weights):
            # One weight has no gradient in one step: it keeps its moments.
            grad = torch.randn(weight.shape, generator=generator)
            weight.grad = None if (step, index) == (2, 1) else _like(grad, weight)
        optimizer.step()


def _like(grad, weight):
    if isinstance(weight, DTensor):
        return distribute_tensor(grad, weight.device_mesh, weight.placements)
    return grad


MAKERS = {
    "fused AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.01, fused=True),
    "AdamW, tensor by tensor": lambda weights: torch.optim.AdamW(weights, lr=0.1, foreach=False),
    "AdamW with a maximum": lambda weights: torch.optim.AdamW(weights, lr=0.1, amsgrad=True, foreach=True),
    "SGD with momentum": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "RMSprop": lambda weights: torch.optim.RMSprop(weights, lr=0.1, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_weights_are_the_same(make):
    plain, offloaded = parameters(), parameters()
    steps(make(plain), plain)
    optimizer = make(offloaded)
    moments = Watched(optimizer, device=CPU, pin=False)
    steps(optimizer, offloaded)
    assert all(map(torch.equal, plain, offloaded))
    assert not torch.equal(plain[0], parameters()[0])
    # Before the first step there is no state. Then it is on the device in every step, and on the host after.
    first, *later = moments.outside
    assert first == []
    assert [any(outside) for outside in later[::2]] == [False] * 4
    assert [all(outside) and len(outside) > 3 for outside in later[1::2]] == [True] * 3


def test_the_buffers_are_the_same_in_every_step():
    weights = parameters()
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    MomentsOffload(optimizer, device=CPU, pin=False)
    steps(optimizer, weights, 1)
    places = [optimizer.state[weight]["exp_avg"].data_ptr() for weight in weights]
    first = optimizer.state[weights[0]]["exp_avg"].clone()
    steps(optimizer, weights, 2)
    assert [optimizer.state[weight]["exp_avg"].data_ptr() for weight in weights] == places
    assert not torch.equal(optimizer.state[weights[0]]["exp_avg"], first)
    assert all(optimizer.state[weight]["step"].ndim == 0 for weight in weights)


def test_a_loaded_state_goes_to_the_buffers():
    """``load_state_dict`` makes new tensors on the weights' device. They are not what the buffers hold."""
    plain, weights = parameters(), parameters()
    reference, optimizer = MAKERS["fused AdamW"](plain), MAKERS["fused AdamW"](weights)
    moments = MomentsOffload(optimizer, device=CPU, pin=False)
    steps(reference, plain, 3)
    steps(optimizer, weights, 1)  # other moments in the buffers
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    with torch.no_grad():
        for weight, wanted in zip(weights, plain, strict=True):
            weight.copy_(wanted)
    moments.to_host()
    assert all(
        torch.equal(optimizer.state[weight]["exp_avg_sq"], reference.state[other]["exp_avg_sq"])
        for weight, other in zip(weights, plain, strict=True)
    )
    steps(reference, plain, 2)
    steps(optimizer, weights, 2)
    assert all(map(torch.equal, plain, weights))


def test_shards_are_moved_part_by_part():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = parameters()
        weights = [
            torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
            for weight in parameters()
        ]
        steps(MAKERS["fused AdamW"](plain), plain)
        optimizer = MAKERS["fused AdamW"](weights)
        MomentsOffload(optimizer, device=CPU, pin=False)
        steps(optimizer, weights)
        moment = optimizer.state[weights[0]]["exp_avg"]
        assert isinstance(moment, DTensor)
        assert moment.placements == (Shard(0),)
        assert all(torch.equal(one, other.full_tensor()) for one, other in zip(plain, weights, strict=True))
    finally:
        torch.distributed.destroy_process_group()


def test_a_run_is_the_same_and_resumes(make_run, tmp_path):
    """The checkpoints are those of a run without offload, and either kind of run can resume them."""

    def fit(name, steps, offload, ckpt_path=None):
        trainer, module, data = make_run(
            steps, run_dir=tmp_path / name, module_options={"offload_moments": offload}
        )
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        saved = torch.load(last_checkpoint(tmp_path / name), weights_only=True)
        return flat_weights(module), saved["optimizer_states"][0]["state"]

    weights, state = fit("plain", 4, False)
    offloaded, offloaded_state = fit("offloaded", 4, True)
    assert torch.equal(weights, offloaded)
    assert state.keys() == offloaded_state.keys()
    assert all(
        torch.equal(value, offloaded_state[index][name])
        for index in state
        for name, value in state[index].items()
    )
    for first, second in [(True, False), (False, True), (True, True)]:
        name = f"{first} {second}"
        fit(name, 2, first)
        resumed, _ = fit(name, 4, second, ckpt_path=str(last_checkpoint(tmp_path / name)))
        assert torch.equal(resumed, weights)


def test_with_everything_on_the_host_there_is_nothing_to_offload(make_run):
    from rpt_lightning.training.distributed.strategy import ShardedStrategy

    trainer, module, data = make_run(
        1,
        module_options={"offload_moments": True},
        strategy=ShardedStrategy(cpu_offload=True),
    )
    try:
        with pytest.raises(
            ValueError, match=r"--model.offload_moments true: with --trainer.strategy.cpu_offload"
        ):
            trainer.fit(module, data)
    finally:
        torch.distributed.destroy_process_group()  # which the strategy made
