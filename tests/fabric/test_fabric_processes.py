"""Loops over Fabric in two real processes give what one process gives on all of the data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run
from training import Net, batches, largest_difference, part, plain

from lightning.fabric import Fabric

TOLERANCE = 1e-6


def ddp(**arguments: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=2, strategy="ddp", **arguments)


def loss_of(model: Any, batch: Tensor, index: int, through_step: bool) -> Tensor:
    if through_step:
        return model.training_step(batch, index)  # type: ignore[no-any-return]
    return (model(batch) - batch.sum(1, keepdim=True)).square().mean()


def train(fabric: Fabric, data: list[Tensor], accumulate: int = 1, through_step: bool = True, **net: Any) -> dict[str, Any]:
    module = Net(**net)
    module.optional.requires_grad_(through_step)
    if fabric.global_rank > 0:  # weights that start out different become those of rank 0
        nn.init.normal_(module.first.weight)
    trained = [p for p in module.parameters() if p.requires_grad]
    model, optimizer = fabric.setup(module, torch.optim.SGD(trained, lr=0.1, momentum=0.9))
    for index, batch in enumerate(data):
        last = (index + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(loss_of(model, batch, index, through_step) / accumulate)
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return plain(model.state_dict())


def alone(accumulate: int = 1, through_step: bool = True) -> dict[str, Any]:
    data = [piece for batch in batches() for piece in batch.split(6 // accumulate)]
    return train(Fabric(accelerator="cpu", devices=1), data, accumulate, through_step)


def trained(rank: int, size: int, accumulate: int, through_step: bool) -> dict[str, Any]:
    pieces = [piece for batch in batches() for piece in part(batch, rank, size).split(3 // accumulate)]
    return train(ddp(), pieces, accumulate, through_step)


@pytest.mark.parametrize("through_step", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_are_those_of_one_process(accumulate: int, through_step: bool) -> None:
    first, second = run(trained, 2, accumulate, through_step)
    assert first == second
    assert largest_difference(first, alone(accumulate, through_step)) < TOLERANCE


def compiled(rank: int, size: int) -> list[Any]:
    import logging

    logging.getLogger("torch").setLevel(logging.ERROR)
    fabric, module = ddp(), Net()
    module.optional.requires_grad_(False)
    model = fabric.setup(torch.compile(module, backend="eager"))
    fabric.backward(loss_of(model, part(batches()[0], rank, size), 0, through_step=False))
    layers = [type(model._forward_module).__name__, type(model._forward_module._orig_mod).__name__, model.module is module]
    return [*layers, module.last.bias.grad.item()]


def test_compiled_module_is_wrapped_and_compiled_again() -> None:
    module = Net()
    loss_of(module, batches()[0], 0, through_step=False).backward()
    assert module.last.bias.grad is not None
    expected = ["OptimizedModule", "DistributedDataParallel", True, pytest.approx(module.last.bias.grad.item())]
    assert run(compiled, 2) == [expected] * 2


class Guarded(Net):
    def predict(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def wrapped(rank: int, size: int) -> list[Any]:
    fabric, module = ddp(), Guarded()
    module.optional.requires_grad_(False)
    model = fabric.setup(module)
    batch = part(batches()[0], rank, size)
    with torch.no_grad():
        free = model.predict(batch).shape
    with pytest.raises(RuntimeError, match="mark_forward_method"):
        model.predict(batch)
    model.mark_forward_method("predict")
    fabric.backward(model.predict(batch).mean())
    averaged = module.last.bias.grad.item()
    module.zero_grad()
    with fabric.no_backward_sync(model):
        fabric.backward(model(batch).mean() * (rank + 1))
    frozen = fabric.setup(nn.ReLU())
    with fabric.no_backward_sync(frozen):
        unwrapped = frozen(batch).shape == batch.shape
    is_ddp = isinstance(model._forward_module, DistributedDataParallel)
    return [is_ddp, list(free), averaged, module.last.bias.grad.item(), unwrapped]


def test_marked_methods_average_and_held_back_ones_do_not() -> None:
    assert run(wrapped, 2) == [[True, [3, 1], 1.0, 1.0, True], [True, [3, 1], 1.0, 2.0, True]]


def two_modules(rank: int, size: int) -> list[Any]:
    fabric = ddp()
    (maker, maker_optimizer), (critic, critic_optimizer) = (
        fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1)) for module in (nn.Linear(5, 3), nn.Linear(3, 1))
    )
    for batch in batches():
        mine = part(batch, rank, size)
        critic_optimizer.zero_grad()
        fabric.backward(critic(maker(mine).detach()).square().mean())
        critic_optimizer.step()
        maker_optimizer.zero_grad()
        fabric.backward(-critic(maker(mine)).mean())
        maker_optimizer.step()
    return [plain(maker.state_dict()), plain(critic.state_dict())]


def test_several_modules_stay_equal_in_all_processes() -> None:
    first, second = run(two_modules, 2)
    assert first == second


# ---- messages -----------------------------------------------------------------------------------------------------------


def communicated(rank: int, size: int) -> dict[str, Any]:
    fabric = ddp()
    mine = torch.full((2,), float(rank))
    whole = torch.tensor([rank, 2])
    leaf = torch.tensor([float(rank)], requires_grad=True)
    gathered = fabric.all_gather(leaf, sync_grads=True)
    (gathered.flatten() * torch.tensor([1.0, 3.0])).sum().backward()
    facts = {
        "gathered": fabric.all_gather({"x": mine, "n": rank, "text": "x"})["x"].tolist(),
        "numbers": fabric.all_gather([rank])[0].tolist(),
        "gradient": leaf.grad.tolist(),  # type: ignore[union-attr]
        "reduced": fabric.all_reduce((mine, "text"), reduce_op="sum")[0].tolist(),
        "in place": mine.tolist(),
        "mean of integers": fabric.all_reduce(whole).tolist(),
        "integers": whole.tolist(),
        "broadcast": fabric.broadcast({"rank": rank}, src=1),
        "sampler": fabric.strategy.distributed_sampler_kwargs["rank"] == rank,
    }
    order = Path("order")
    with fabric.rank_zero_first():
        with order.open("a") as file:
            file.write(str(rank))
    with fabric.rank_zero_first(local=True):
        facts["first"] = order.read_text()
    fabric.barrier()
    return facts


def test_processes_tell_each_other() -> None:
    expected = {
        "gathered": [[0.0, 0.0], [1.0, 1.0]], "numbers": [0, 1], "reduced": [1.0, 1.0], "in place": [1.0, 1.0],
        "mean of integers": [0.5, 2.0], "broadcast": {"rank": 1}, "sampler": True,
    }  # fmt: skip
    for rank, facts in enumerate(run(communicated, 2)):
        assert {name: facts[name] for name in expected} == expected
        assert facts["gradient"] == [[2.0, 6.0][rank]]
        assert facts["integers"] == [rank, 2]
        assert facts["first"] in ("0", "01")


# ---- data ---------------------------------------------------------------------------------------------------------------


def shared_out(rank: int, size: int) -> dict[str, Any]:
    os.environ["PL_GLOBAL_SEED"] = "7"
    fabric = ddp()
    data = TensorDataset(torch.arange(5))
    own: DistributedSampler[Any] = DistributedSampler(data, size, rank, shuffle=False)

    def passes(loader: Any, count: int = 1) -> list[Any]:
        return [[number for (batch,) in loader for number in batch.tolist()] for _ in range(count)]

    ordered, shuffled, random = fabric.setup_dataloaders(
        DataLoader(data, batch_size=2),
        DataLoader(data, batch_size=2, shuffle=True),
        DataLoader(data, sampler=RandomSampler(data, replacement=True, num_samples=4)),
    )
    everything = fabric.setup_dataloaders(DataLoader(data), use_distributed_sampler=False)
    mine = fabric.setup_dataloaders(DataLoader(data, sampler=own))
    batched = fabric.setup_dataloaders(DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, drop_last=False)))
    return {
        "ordered": passes(ordered),
        "shuffled": passes(shuffled, 2),
        "random": len(passes(random)[0]),
        "everything": passes(everything),
        "own": passes(mine) == [list(own)],
        "length": len(ordered),
        "sizes": [len(batch) for (batch,) in batched],
    }


def test_loaders_are_shared_out() -> None:
    first, second = run(shared_out, 2)
    assert (first["ordered"], second["ordered"]) == ([[0, 2, 4]], [[1, 3, 0]])
    for one, other in zip(first["shuffled"], second["shuffled"]):
        assert sorted({*one, *other}) == [0, 1, 2, 3, 4]
        assert len(one) == len(other) == 3
    assert first["shuffled"][0] != first["shuffled"][1]
    for facts in (first, second):
        assert facts["everything"] == [[0, 1, 2, 3, 4]]
        assert (facts["own"], facts["random"], facts["length"], facts["sizes"]) == (True, 2, 2, [2, 1])


# ---- checkpoints --------------------------------------------------------------------------------------------------------


def saved_and_loaded(rank: int, size: int, folder: str) -> list[Any]:
    fabric = ddp()
    module = Net()
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
    fabric.backward(model.training_step(part(batches()[0], rank, size), 0))
    optimizer.step()
    path = Path(folder) / "a.ckpt"
    fabric.save(path, {"model": model, "optimizer": optimizer, "rank": rank})
    there = path.exists()  # in all processes, once one has returned
    other = Net()
    other_model, other_optimizer = fabric.setup(other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))
    state: dict[str, Any] = {"model": other_model, "optimizer": other_optimizer, "rank": None}
    rest = fabric.load(path, state)
    buffers = [other_optimizer.state[p]["momentum_buffer"] for p in other.parameters()]
    expected = [optimizer.state[p]["momentum_buffer"] for p in module.parameters()]
    same = all(torch.equal(*pair) for pair in zip(buffers, expected))
    return [there, rest, state["rank"], plain(other.state_dict()) == plain(module.state_dict()), same]


def test_one_process_writes_and_all_read(tmp_path: Path) -> None:
    assert run(saved_and_loaded, 2, str(tmp_path)) == [[True, {}, 0, True, True]] * 2
    fabric, module = Fabric(accelerator="cpu", devices=1), Net()
    fabric.load(tmp_path / "a.ckpt", {"model": fabric.setup(module)})
    assert os.listdir(tmp_path) == ["a.ckpt"]
