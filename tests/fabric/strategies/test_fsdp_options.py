"""The arguments of FSDPStrategy: what they choose, and what is refused, with advice."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
)
from torch.distributed.fsdp.wrap import (
    CustomPolicy,
    ModuleWrapPolicy,
    lambda_auto_wrap_policy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from sharded import fit, fsdp, set_up, weights
from training import largest_difference

from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.precision import MixedPrecision as Mixed
from lightning.fabric.strategies import fsdp_options
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.fsdp_module import root_of
from lightning.fabric.strategies.fsdp_units import choose_units
from lightning.fabric.strategies.registry import StrategyRegistry
from lightning.fabric.strategies.sharding import is_dtensor
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.utilities.warnings import PossibleUserWarning

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)


# ---- policies over modules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        {Block},
        [Block],
        Block,
        ModuleWrapPolicy({Block}),
        CustomPolicy(lambda module: isinstance(module, Block)),
        partial(transformer_auto_wrap_policy, transformer_layer_cls={Block}),
        partial(lambda_auto_wrap_policy, lambda_fn=lambda module: isinstance(module, Block)),
        partial(size_based_auto_wrap_policy, min_num_params=40),
        lambda module: isinstance(module, Block),
        lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, Block),
    ],
)
def test_policies_of_every_form_choose_the_blocks(policy: Any) -> None:
    model = Model()
    strategy = FSDPStrategy(auto_wrap_policy=policy)
    assert fsdp_options.selected(strategy.options.wrap_policy, model) == list(model.blocks)


def test_policy_by_size_counts_what_is_not_chosen_below() -> None:
    model = Model()
    policy = partial(size_based_auto_wrap_policy, min_num_params=20)
    chosen = fsdp_options.selected(policy, model)
    assert chosen == [layer for block in model.blocks for layer in (block.inner, block.outer)]


def test_policy_that_chooses_nothing_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"chooses no module of Model.*made of: Block, Embedding, Linear, ModuleList"):
        choose_units(Model(), (nn.Conv2d,), False, set())


def test_policy_that_chooses_what_is_never_called_is_refused() -> None:
    with pytest.raises(ValueError, match="chooses a ModuleList, which is never called"):
        choose_units(Model(), (nn.ModuleList,), False, set())


def test_policy_with_options_for_single_modules_is_refused() -> None:
    policy = CustomPolicy(lambda module: {"forward_prefetch": True} if isinstance(module, Block) else False)
    with pytest.raises(ValueError, match="let it return True or False"):
        choose_units(Model(), policy, False, set())


def test_without_a_policy_the_advice_names_a_class() -> None:
    with pytest.warns(PossibleUserWarning, match=r"no auto_wrap_policy.*holds the whole model.*auto_wrap_policy=\{Block\}"):
        assert choose_units(Model(), None, False, set()) == []


def test_model_of_one_block_without_a_policy_is_refused() -> None:
    alone, within = nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2))
    for model in (alone, within):
        with pytest.raises(ValueError, match=r"of one block, a Linear.*Use strategy='ddp'.*auto_wrap_policy=\{Linear\}"):
            choose_units(model, None, False, set())
    assert choose_units(alone, (nn.Linear,), False, set()) == []
    assert choose_units(within, (nn.Linear,), False, set()) == [within[1]]


def test_modules_that_share_weights_with_others_are_gathered_with_them() -> None:
    model = Model()
    model.blocks[0].inner.weight = model.blocks[1].inner.weight  # type: ignore[union-attr]
    assert choose_units(model, (Block, nn.Embedding), False, set()) == [model.embed]
    within = Model()
    within.blocks[0].inner.weight = within.blocks[0].outer.weight  # type: ignore[union-attr]
    assert choose_units(within, (Block,), False, set()) == list(within.blocks)


def test_layer_that_attention_never_calls_is_gathered_with_it() -> None:
    attention = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    assert choose_units(attention, (nn.Linear,), False, set()) == [attention[1]]


def test_policy_is_not_used_where_the_user_has_divided_parts() -> None:
    with pytest.warns(UserWarning, match="auto_wrap_policy is not used"):
        assert choose_units(Model(), (Block,), True, set()) == []


# ---- torch's objects ----------------------------------------------------------------------------------------------------


def test_precision_becomes_a_policy() -> None:
    def policy(device: torch.device, name: str | None = None, **kwargs: Any) -> Any:
        precision = Mixed(name, device.type) if name else None
        return FSDPStrategy(parallel_devices=[device], precision=precision, **kwargs).mixed_precision_config

    expected = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    assert policy(CUDA, "bf16-mixed") == expected
    assert policy(CUDA, "16-mixed").param_dtype == torch.float16
    assert policy(CPU, "bf16-mixed") == policy(CUDA) == MixedPrecisionPolicy()
    own = MixedPrecisionPolicy(torch.float16)
    assert policy(CUDA, "bf16-mixed", mixed_precision=own) is own
    old = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert policy(CUDA, mixed_precision=old) == MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True)


def test_precision_under_its_documented_name() -> None:
    mixed, full = FSDPPrecision("bf16-mixed"), FSDPPrecision("32-true")
    assert mixed.mixed_precision_config == MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    assert FSDPStrategy(parallel_devices=[CUDA], precision_plugin=mixed).mixed_precision_config == mixed.mixed_precision_config
    assert (full.mixed_precision_config, full.scaler, full.state_dict()) == (MixedPrecisionPolicy(), None, {})
    data = torch.zeros(1, dtype=torch.float64)
    assert full.convert_input(data) is data
    for arguments, said in ((("8-true",), "'8-true'"), (("bf16-mixed", torch.amp.GradScaler("cpu")), "leave out scaler")):  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=said):
            FSDPPrecision(*arguments)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, OffloadPolicy()),
        (False, OffloadPolicy()),
        (CPUOffload(), OffloadPolicy()),
        (True, CPUOffloadPolicy()),
        (CPUOffload(offload_params=True), CPUOffloadPolicy()),
        (CPUOffloadPolicy(pin_memory=False), CPUOffloadPolicy(pin_memory=False)),
    ],
)
def test_offload_becomes_a_policy(given: Any, expected: Any) -> None:
    strategy = FSDPStrategy(parallel_devices=[CUDA], cpu_offload=given)
    assert fsdp_options.offload_policy(strategy.options, CUDA) == expected
    assert strategy.offloads is isinstance(expected, CPUOffloadPolicy)


@pytest.mark.parametrize(
    ("given", "name", "reshards"),
    [
        ("FULL_SHARD", "FULL_SHARD", None),
        ("shard_grad_op", "SHARD_GRAD_OP", False),
        (ShardingStrategy.HYBRID_SHARD, "HYBRID_SHARD", None),
        (ShardingStrategy._HYBRID_SHARD_ZERO2, "_HYBRID_SHARD_ZERO2", False),
        (ShardingStrategy.NO_SHARD, "NO_SHARD", False),
    ],
)
def test_sharding_strategies_by_name_and_by_torchs_enum(given: Any, name: str, reshards: bool | None) -> None:
    strategy = FSDPStrategy(sharding_strategy=given)
    assert (strategy.sharding_strategy, strategy.options.reshard_after_forward) == (name, reshards)


def shapes(rank: int, size: int) -> list[Any]:
    found: list[Any] = []
    for kwargs, nodes in (
        ({}, 1),
        ({"sharding_strategy": "NO_SHARD"}, 1),
        ({"sharding_strategy": "HYBRID_SHARD"}, 1),
        ({"sharding_strategy": "HYBRID_SHARD"}, 2),
        ({"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 1)}, 1),
        ({"device_mesh": (2,)}, 1),
    ):
        strategy = fsdp(size, **kwargs)
        strategy.num_nodes = nodes
        strategy.setup_environment()
        found.append((tuple(strategy.device_mesh.shape), strategy.device_mesh.mesh_dim_names))
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    strategy = fsdp(size, device_mesh=mesh, sharding_strategy="HYBRID_SHARD")
    strategy.setup_environment()
    found.append(strategy.device_mesh is mesh)
    with pytest.raises(ValueError, match=r"2 x 2 = 4 processes, and the run has 2"):
        fsdp(size, device_mesh=(2, 2), sharding_strategy="HYBRID_SHARD").setup_environment()
    return found


def test_meshes_of_the_sharding_strategies() -> None:
    one, two = ("shard",), ("replicate", "shard")
    expected = [((2,), one), ((2, 1), two), ((2,), one), ((2, 1), two), ((2, 1), two), ((2,), one), True]
    assert run(shapes, 2) == [expected] * 2


# ---- refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"sharding_strategy": "SOME"}, ValueError, "sharding_strategy='SOME' is not known. Accepted: 'FULL_SHARD'"),
        ({"state_dict_type": "local"}, ValueError, "state_dict_type='local' is not known. Accepted: 'full', 'sharded'"),
        ({"device_mesh": (2, 2)}, ValueError, "needs sharding_strategy='HYBRID_SHARD'"),
        ({"device_mesh": (2, 2), "sharding_strategy": "SHARD_GRAD_OP"}, ValueError, "needs sharding_strategy='HYBRID_SHARD'"),
        ({"device_mesh": (4,), "sharding_strategy": "HYBRID_SHARD"}, ValueError, "two numbers, of copies and of shards"),
        ({"activation_checkpointing": Block, "activation_checkpointing_policy": {Block}}, ValueError, "mean the same"),
        ({"auto_wrap_policy": {"Block"}}, TypeError, "a set of one or more classes of modules"),
        ({"auto_wrap_policy": set()}, TypeError, "a set of one or more classes of modules"),
        ({"auto_wrap_policy": 3}, TypeError, "auto_wrap_policy=3"),
        ({"mixed_precision": "bf16"}, TypeError, "MixedPrecisionPolicy"),
        ({"mixed_precision": MixedPrecision(keep_low_precision_grads=True)}, ValueError, "keep_low_precision_grads"),
        ({"cpu_offload": "yes"}, TypeError, "cpu_offload='yes'"),
        ({"use_orig_params": False}, ValueError, "use_orig_params=False.*never flattens"),
        ({"limit_all_gathers": False}, ValueError, "limit_all_gathers=False"),
        ({"backward_prefetch": BackwardPrefetch.BACKWARD_POST}, ValueError, "always gathers the next weights"),
        ({"backward_prefetch": None}, ValueError, "backward_prefetch=None"),
        ({"process_group": object()}, ValueError, "pass `device_mesh="),
        ({"device_id": 0}, ValueError, "leave it out"),
        ({"mesh": object()}, ValueError, "Pass it as `device_mesh`"),
        ({"mp_policy": object()}, ValueError, "Pass it as `mixed_precision`"),
        ({"shards": 2}, TypeError, "'shards', which neither it nor fully_shard takes.*ignored_modules"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(kwargs: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        FSDPStrategy(**kwargs)


def test_arguments_of_the_first_fsdp_that_mean_the_same_are_taken() -> None:
    FSDPStrategy(use_orig_params=True, limit_all_gathers=True, backward_prefetch=BackwardPrefetch.BACKWARD_PRE, sync_module_states=True)


def test_names_are_entered_into_a_registry() -> None:
    registry = StrategyRegistry()
    FSDPStrategy.register_strategies(registry)
    assert registry.available_strategies() == ["fsdp", "fsdp_cpu_offload"]
    assert registry.get("fsdp_cpu_offload").offloads


# ---- in a run -----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.layer(x))


def refused_in_a_run(rank: int, size: int) -> None:
    mixed = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16)))
    with pytest.raises(ValueError, match=r"bfloat16, torch\.float32, and those that are gathered together must be of one dtype"):
        fsdp(size, auto_wrap_policy={nn.Sequential}).setup_module(mixed)
    strategy, module = fsdp(size), Counting()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    strategy.connect(module)
    strategy.setup_module(module)
    with pytest.raises(ValueError, match=r"holds none of the module's parameters"):
        strategy.setup_optimizer(optimizer)
    with pytest.raises(ValueError, match=r"gradient_clip_algorithm='max' is not known"):
        strategy.clip_gradients(optimizer, 1.0, "max")
    with pytest.raises(TypeError, match=r"storage_options=.*state_dict_type='full'"):
        fsdp(size, state_dict_type="sharded").save_checkpoint({}, "x", storage_options={"a": 1})


def test_modules_optimizers_and_saves_that_cannot_be_served() -> None:
    run(refused_in_a_run, 2)


def without_weights(rank: int, size: int) -> bool:
    strategy, module = fsdp(size), nn.Tanh()
    strategy.connect(module)
    step = strategy.bind("forward")
    return strategy.setup_module(module) is module and root_of(module) is None and step(torch.zeros(1)).item() == 0


def test_module_without_weights_is_left_as_it_is() -> None:
    assert run(without_weights, 2) == [True] * 2


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Counting(), Counting()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.second(self.first(batch)).square().mean()  # type: ignore[no-any-return]


def checkpointed(rank: int, size: int, around: bool) -> list[Any]:
    """Activations that are computed again: of what is gathered on its own, or of what holds several such."""
    module: Any = Stack()
    chosen = {"activation_checkpointing_policy": {Counting}, "auto_wrap_policy": {nn.Linear} if around else {Counting}}
    strategy = fsdp(size, **chosen)
    optimizer = set_up(strategy, module, lr=0.1)
    fit(strategy, optimizer, [torch.ones(2, 4)] * 3)
    return [module.first.calls, module.second.calls, list(module.state_dict()), weights(strategy)]


@pytest.mark.parametrize("around", [False, True])
def test_activations_are_computed_again_and_names_stay(around: bool) -> None:
    torch.manual_seed(1)
    reference = SingleDeviceStrategy()
    fit(reference, set_up(reference, Stack(), lr=0.1), [torch.ones(2, 4)] * 3)
    names = ["first.layer.weight", "first.layer.bias", "second.layer.weight", "second.layer.bias"]
    for first, second, found, states in run(checkpointed, 2, around):
        assert (first, second, found) == (6, 6, names)
        assert largest_difference(states, weights(reference)) < 1e-6


def leaving_alone(rank: int, size: int) -> list[Any]:
    module: Any = Stack()
    strategy = fsdp(size, ignored_modules=[module.first])
    optimizer = set_up(strategy, module, lr=0.1)
    fit(strategy, optimizer, [torch.full((2, 4), float(rank + 1))])
    return [is_dtensor(module.first.layer.weight), is_dtensor(module.second.layer.weight), module.first.layer.bias.tolist()]


def test_ignored_modules_are_neither_divided_nor_averaged() -> None:
    (first, second, mine), (_, _, other) = run(leaving_alone, 2)
    assert (first, second) == (False, True)
    assert mine != other


class Branching(nn.Module):
    """Processes that use different weights of one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.sum() > 0 else self.right(x)  # type: ignore[no-any-return]


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branching = Branching()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.branching(batch).mean()  # type: ignore[no-any-return]


def branching(rank: int, size: int) -> list[float]:
    module: Any = Tree()
    strategy = fsdp(size, auto_wrap_policy={Branching}, reduce_scatter_unused_params=True)
    optimizer = set_up(strategy, module, lr=1.0)
    before = weights(strategy)
    fit(strategy, optimizer, [torch.full((1, 4), 1.0 - 2 * rank)])
    after = weights(strategy)
    return [before[f"branching.{name}.bias"][0] - after[f"branching.{name}.bias"][0] for name in ("left", "right")]


def test_processes_may_use_different_weights_where_that_is_asked_for() -> None:
    for steps in run(branching, 2):
        assert steps == pytest.approx([0.125, 0.125])  # of each process one quarter, halved
