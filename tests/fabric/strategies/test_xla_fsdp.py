"""XLAFSDPStrategy on one and two CPU devices of torch_xla: the same weights as of one device, and as whole in checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from training import Net, batches, largest_difference, part, plain, train
from xla_devices import IS_MISSING, REASON, run

from lightning.fabric.checkpoint.sharded import is_sharded_checkpoint, read_sharded
from lightning.fabric.precision import HalfPrecision
from lightning.fabric.strategies import STRATEGY_REGISTRY, SingleDeviceStrategy, XLAFSDPStrategy
from lightning.fabric.strategies.xla_shards import boxes
from lightning.fabric.utilities.exceptions import MisconfigurationException

needs_xla = pytest.mark.skipif(IS_MISSING, reason=REASON)
TOLERANCE = 1e-6


def made(devices: int, **options: Any) -> XLAFSDPStrategy:
    strategy = XLAFSDPStrategy(parallel_devices=[torch.device("xla", index) for index in range(devices)], **options)
    strategy.set_world_ranks()
    strategy.configure_launcher()
    return strategy


class Model(Net):
    """With a buffer, layers that share a weight, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([2.0]))
        self.tied = nn.Linear(7, 7)
        self.tied.weight = self.optional.weight
        self.frozen = nn.Linear(7, 7)
        self.frozen.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = torch.tanh(self.first(batch)) * self.scale
        hidden = hidden + self.frozen(self.tied(self.optional(hidden)))
        return (self.last(hidden) - batch.sum(1, keepdim=True)).square().mean()


def expected(accumulate: int = 1) -> dict[str, Any]:
    return train(SingleDeviceStrategy(), Model(), batches(), accumulate=accumulate)


def ran(strategy: XLAFSDPStrategy, module: nn.Module, devices: int, accumulate: int = 1) -> dict[str, Any]:
    """Train, save, load, evaluate, tear down."""
    strategy.setup_environment()
    rank = strategy.global_rank
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if rank:
                tensor.fill_(1)  # which that of rank 0 replaces
    data = [part(batch.to(strategy.root_device), rank, devices) for batch in batches()]
    kind, strategy.state_dict_type = strategy.state_dict_type, "full"  # which `train` returns
    train(strategy, module, data, accumulate=accumulate)
    strategy.state_dict_type = kind
    (optimizer,) = strategy.optimizers
    found: dict[str, Any] = {"held": [list(parameter.shape) for parameter in optimizer.param_groups[0]["params"]]}
    names = [name for name, _ in module.named_parameters()]
    found["names"] = names
    state, optimizer_state = strategy.lightning_module_state_dict(), strategy.optimizer_state(optimizer)
    strategy.save_checkpoint({"state_dict": state, "optimizer_states": [optimizer_state], "epoch": 3}, f"saved-{devices}")
    del state, optimizer_state
    strategy.barrier("saved")
    checkpoint = strategy.load_checkpoint(f"saved-{devices}")
    found["weights"] = plain(checkpoint["state_dict"])
    found["keys"] = list(checkpoint["state_dict"]) == list(Model().state_dict()) if isinstance(module, Model) else None
    with torch.no_grad():
        outputs = strategy.bind("validation_step")(data[0], 0)
        trained = outputs.flatten().tolist()
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.fill_(0.5)
        for values in optimizer.state.values():
            values["momentum_buffer"].zero_()
        strategy.load_model_state_dict(checkpoint)
        strategy.load_optimizer_state(optimizer, checkpoint["optimizer_states"][0])
        found["same outputs"] = strategy.bind("validation_step")(data[0], 0).flatten().tolist() == trained
    again = strategy.optimizer_state(optimizer)
    strategy.save_checkpoint({"state_dict": {}, "optimizer_states": [again]}, f"again-{devices}")
    strategy.barrier("saved again")
    momenta = [
        {index: values["momentum_buffer"].flatten().tolist() for index, values in each["optimizer_states"][0]["state"].items()}
        for each in (checkpoint, strategy.load_checkpoint(f"again-{devices}"))
    ]
    found["same momenta"] = momenta[0] == momenta[1]
    found["momenta"] = [len(momentum) for momentum in momenta[0].values()]
    del again
    strategy.teardown()
    found["whole"] = plain(module.state_dict())
    found["patched"] = [name for each in module.modules() for name in vars(each) if name == "forward" or name.endswith("_original")]
    return found


def launched(devices: int, accumulate: int, options: dict[str, Any], layered: bool) -> dict[str, Any]:
    if layered:
        options = {**options, "auto_wrap_policy": {nn.Linear}}
    module: nn.Module = Net() if layered else Model()
    strategy = made(devices, **options)
    if devices == 1:
        return ran(strategy, module, devices, accumulate)
    result: dict[str, Any] = strategy.launcher.launch(ran, strategy, module, devices, accumulate)
    return result


WHOLE, DIVIDED = {"state_dict_type": "full"}, {"sequential_save": True}


@needs_xla
@pytest.mark.parametrize(
    ("devices", "accumulate", "options", "layered"),
    [(1, 1, WHOLE, False), (2, 1, DIVIDED, False), (2, 2, WHOLE, True), (2, 1, {"flatten_parameters": True}, False)],
    ids=["one device", "two devices", "layers, accumulating", "flattened"],
)
def test_weights_equal_those_of_one_device(devices: int, accumulate: int, options: dict[str, Any], layered: bool, tmp_path: Path) -> None:
    found = run(launched, devices, accumulate, options, layered, devices=devices)
    reference = train(SingleDeviceStrategy(), Net(), batches(), accumulate=accumulate) if layered else expected(accumulate)
    assert largest_difference(found["weights"], reference) < TOLERANCE, "in the checkpoint"
    assert largest_difference(found["whole"], reference) < TOLERANCE, "in the module afterwards"
    assert found["keys"] in (True, None)
    assert found["same outputs"]
    assert found["same momenta"]
    assert found["patched"] == [], "torch_xla's changes to the layers are undone"
    assert {len(shape) for shape in found["held"]} == {1}, "parts of the weights, in order"
    if not layered and "flatten_parameters" not in options:
        assert found["names"] == [name for name, _ in Model().named_parameters()]
        assert found["momenta"] == [parameter.numel() for parameter in Model().parameters() if parameter.requires_grad]
    path = tmp_path / f"saved-{devices}"
    assert is_sharded_checkpoint(path) == (options is not WHOLE)
    saved = torch.load(path, weights_only=True) if options is WHOLE else read_sharded(path)
    assert largest_difference(plain(saved["state_dict"]), reference) < TOLERANCE, "as other strategies read it"
    assert saved["epoch"] == 3


# ---- on one device ------------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)])
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output = self(batch)
        self.dtypes.add(output.dtype)
        return output.float().square().mean()  # type: ignore[no-any-return]


def details() -> dict[str, Any]:
    found: dict[str, Any] = {}
    strategy = made(1, auto_wrap_policy={nn.Linear}, activation_checkpointing_policy={nn.Linear}, state_dict_type="full")
    strategy.setup_environment()
    data = [batch.to("xla:0") for batch in batches()]
    found["checkpointed"] = train(strategy, Blocks(), data)
    found["units"] = sum(hasattr(module, "sharded_params") for module in strategy.model.modules())
    strategy.teardown()

    def policy(module: nn.Module, recurse: bool, unwrapped_params: int) -> bool:
        return recurse or isinstance(module, nn.Tanh)

    found["by a function"] = train(made(1, auto_wrap_policy=policy, state_dict_type="full"), Blocks(), data)

    strategy = made(1, precision=HalfPrecision("bf16-true"), state_dict_type="full")
    module = Blocks()
    train(strategy, module, [batch.bfloat16() for batch in data])
    found["half"] = (sorted(map(str, module.dtypes)), sorted({str(t.dtype) for t in strategy.lightning_module_state_dict().values()}))

    strategy = made(1, state_dict_type="full")
    module = Blocks()
    strategy.connect(module)
    strategy.model = strategy.setup_module(module)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    strategy.backward(strategy.bind("training_step")(data[0], 0))
    found["norm"] = [
        float(strategy.clip_gradients_norm(strategy.model, sgd, norm, order)) for norm, order in ((0.01, 2.0), (1.0, float("inf")))
    ]
    found["called"] = list(strategy.as_forward(strategy.model, module.forward)(data[0]).shape)
    found["through forward"] = list(strategy.model(data[0]).shape)
    with strategy.module_init_context():
        found["built"] = str(nn.Linear(2, 2).weight.device)

    manual = Blocks()
    manual.automatic_optimization = False  # type: ignore[assignment]
    for name, wrong in {"manual": manual, "dtype": Blocks().double()}.items():
        try:
            made(1).setup_module(wrong)
        except MisconfigurationException as error:
            found[name] = str(error)
    shared = Blocks()
    shared.blocks[1][0].weight = shared.blocks[0][0].weight  # type: ignore[index]
    try:
        made(1, auto_wrap_policy={nn.Linear}).setup_module(shared)
    except MisconfigurationException as error:
        found["shared"] = str(error)
    for options in ({"state_dict_type": "half"}, {"activation_checkpointing_policy": {nn.Linear}, "auto_wrapper_callable": print}):
        try:
            XLAFSDPStrategy(**options)  # type: ignore[arg-type]
        except ValueError as error:
            found.setdefault("arguments", []).append(str(error))
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if IS_MISSING:
        pytest.skip(REASON)
    result: dict[str, Any] = run(details)
    return result


def test_policies_change_how_weights_are_gathered_and_not_what_they_become(found: dict[str, Any]) -> None:
    reference = train(SingleDeviceStrategy(), Blocks(), batches())
    assert largest_difference(found["checkpointed"], reference) < TOLERANCE
    assert found["units"] == 4
    assert largest_difference(found["by a function"], reference) < TOLERANCE


def test_half_precision_computes_in_it_and_keeps_weights_in_float32(found: dict[str, Any]) -> None:
    assert found["half"] == (["torch.bfloat16"], ["torch.float32"])


def test_norm_is_that_of_whole_gradients(found: dict[str, Any]) -> None:
    module = Blocks()
    module.training_step(batches()[0], 0).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.01))
    largest = max(float(parameter.grad.abs().max()) for parameter in module.parameters() if parameter.grad is not None)
    assert found["norm"] == [pytest.approx(norm, rel=1e-5), pytest.approx(largest, rel=1e-4)]


def test_modules_are_called_with_gathered_weights_and_built_on_the_host(found: dict[str, Any]) -> None:
    assert found["called"] == found["through forward"] == [6, 5]
    assert found["built"] == "cpu"


def test_what_it_cannot_do_is_refused(found: dict[str, Any]) -> None:
    assert "automatic_optimization=False is not possible" in found["manual"]
    assert "'blocks.0.0.weight' in torch.float64" in found["dtype"]
    assert "'blocks.1.0.weight' and 'blocks.0.0.weight' share one weight" in found["shared"]
    assert [message.split(" ")[0] for message in found["arguments"]] == ["state_dict_type='half'", "activation_checkpointing_policy"]


# ---- without torch_xla --------------------------------------------------------------------------------------------------


def test_name_is_registered() -> None:
    assert STRATEGY_REGISTRY["xla_fsdp"]["strategy"] is XLAFSDPStrategy
    assert STRATEGY_REGISTRY["xla_fsdp"]["init_params"] == {}


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (1, 5, 1, 2)])
def test_boxes_cover_consecutive_elements_once(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel()):
        for stop in range(start, whole.numel() + 1):
            taken = [
                whole[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))].reshape(-1)
                for offsets, sizes in boxes(shape, start, stop)
            ]
            assert torch.cat([*taken, torch.empty(0, dtype=torch.long)]).tolist() == list(range(start, stop))


@pytest.mark.skipif(not IS_MISSING, reason="says what happens without torch_xla")
def test_it_says_what_to_install() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"XLAFSDPStrategy needs the package torch_xla: `pip install"):
        XLAFSDPStrategy()
