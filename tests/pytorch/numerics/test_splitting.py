"""Batches that need more memory than there is give the gradients and logs of the whole."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run, run_to_end
from sharded import fsdp
from trainers import Rows, joined, quiet

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule

TOLERANCE = 1e-6
INF = float("inf")


class Limited(torch.autograd.Function):
    """The identity, which has memory for so many samples only, forward or backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        if len(x) > forward:
            torch.empty(2**46)
        ctx.backward_limit = backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if len(gradient) > ctx.backward_limit:
            torch.empty(2**46)
        return gradient, None, None


class Net(LightningModule):
    """Limits stand between its layers, so that a failed backward pass has made some of the gradients already."""

    def __init__(self, forward: float = INF, backward: float = INF, drop: float = 0.0, norm: bool = False, ranks: Any = (0, 1)) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.last = nn.Linear(6, 1)
        self.unused = nn.Parameter(torch.ones(2))
        self.limits = (forward, backward)
        self.ranks = ranks
        self.drop = drop
        self.sizes: list[int] = []
        self.gradients: list[list[Tensor]] = []
        self.outputs: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, names = batch["x"], batch["name"]
        assert len(names) == len(x)
        self.sizes.append(len(x))
        hidden = self.norm(self.first(x))
        limited = self.trainer.global_rank in self.ranks
        hidden = Limited.apply(hidden, *self.limits) if limited else hidden
        y = self.last(nn.functional.dropout(torch.tanh(hidden), self.drop))
        loss = (y - x.sum(1, keepdim=True)).square().mean()
        self.log("mean", loss, on_step=True, on_epoch=True)
        self.log("number", float(len(x)), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("largest", x.max(), on_step=True, on_epoch=True, reduce_fx="max")
        self.log("told", loss, on_step=False, on_epoch=True, batch_size=len(x))
        self.log("constant", loss, on_step=False, on_epoch=True, batch_size=100)
        return {"loss": loss, "y": y}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Data(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.x = torch.randn(count, 3, generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return {"x": self.x[index], "name": f"sample {index}"}


def trained(module: Net, count: int = 22, batch_size: int = 8, **arguments: Any) -> tuple[Any, list[str]]:
    """The trainer after a run over batches of 8, 8 and 6 samples, and the warnings."""
    torch.manual_seed(11)
    trainer = quiet(**{"on_out_of_memory": "split_batch", **arguments})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(Data(count), batch_size=batch_size))
    return trainer, [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


def distance(first: Net, second: Net) -> float:
    assert len(first.gradients) == len(second.gradients)
    pairs = [(a, b) for one, other in zip(first.gradients, second.gradients) for a, b in zip(one, other)]
    return max(float((a - b).detach().abs().max()) for a, b in [*pairs, *zip(first.parameters(), second.parameters())])


LIMITS = [(INF, 4), (4, INF), (5, 3), (1, 1), (3, INF)]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"accumulate_grad_batches": 2}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}, {"precision": "64-true"}],
)
def test_gradients_are_those_of_the_whole_batch(limits: Any, arguments: Any) -> None:
    whole, split = Net(), Net(*limits)
    (plain, _), (trainer, told) = trained(whole, on_out_of_memory="raise", **arguments), trained(split, **arguments)
    assert max(split.sizes[-2:]) <= min(limits)
    assert distance(whole, split) < TOLERANCE
    assert len(told) == 1
    assert "Memory ran out, so training batches are run in parts of at most" in told[0]
    for name, value in plain.callback_metrics.items():
        assert trainer.callback_metrics[name] == pytest.approx(value.item(), abs=1e-6), name
    for one, other in zip(whole.outputs, split.outputs):
        assert one["loss"] == pytest.approx(other["loss"].item(), abs=1e-6)
        assert one["y"].shape == other["y"].shape


def test_size_that_fitted_is_remembered() -> None:
    module = Net(backward=4)
    trained(module)
    assert module.sizes == [8, 4, 4, 4, 4, 3, 3]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_changes_where_memory_suffices(accumulate: int) -> None:
    whole, split = Net(drop=0.5, norm=True), Net(drop=0.5, norm=True)
    (plain, _), (trainer, told) = (
        trained(module, on_out_of_memory=policy, accumulate_grad_batches=accumulate)
        for module, policy in ((whole, "raise"), (split, "split_batch"))
    )
    assert told == []
    assert distance(whole, split) == 0
    assert all(torch.equal(trainer.callback_metrics[name], value) for name, value in plain.callback_metrics.items())
    assert torch.equal(whole.norm.running_mean, split.norm.running_mean)


def test_random_numbers_and_running_statistics_begin_again() -> None:
    class Once(Net):
        """Fails in its second step, whatever the size."""

        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.calls += 1
            self.limits = (INF, 0 if self.calls == 2 else INF)
            return super().training_step(batch, batch_idx)

    class InHalves(Net):
        """Splits its second batch by hand, and the rest into such parts too."""

        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            size = len(batch["x"])
            half = size if batch_idx == 0 else 4 if size == 8 else 3
            for start in range(0, size, half):
                part = {name: value[start : start + half] for name, value in batch.items()}
                self.manual_backward(super().training_step(part, batch_idx)["loss"] * half / size)
            optimizer.step()

    module, by_hand = Once(drop=0.5, norm=True), InHalves(drop=0.5, norm=True)
    by_hand.automatic_optimization = False
    _, told = trained(module)
    trained(by_hand, on_out_of_memory="raise")
    assert distance(module, by_hand) < TOLERANCE
    assert torch.allclose(module.norm.running_mean, by_hand.norm.running_mean, atol=1e-7)
    assert "batch normalisation takes the statistics of each part for itself" in told[0]


def test_rows_of_loggers_are_those_of_whole_batches() -> None:
    whole, split = Rows(), Rows()
    trained(Net(), on_out_of_memory="raise", logger=whole)
    trained(Net(backward=3), logger=split)
    assert len(whole.rows) == len(split.rows)
    for (step, row), (other_step, other) in zip(whole.rows, split.rows):
        assert step == other_step
        assert other == pytest.approx(row, abs=1e-6)


def test_metric_objects_count_each_sample_once() -> None:
    from torchmetrics import MeanMetric, SumMetric

    class Measuring(Net):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.count, self.level = SumMetric(), MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            self.count.update(float(len(batch["x"])))
            self.level(batch["x"].mean(), weight=len(batch["x"]))
            self.log("count", self.count, on_step=False, on_epoch=True)
            self.log("level", self.level, on_step=False, on_epoch=True)
            return outputs

    (plain, _), (trainer, _) = trained(Measuring(), on_out_of_memory="raise"), trained(Measuring(backward=3))
    assert trainer.callback_metrics["count"] == 22
    assert trainer.callback_metrics["level"] == pytest.approx(plain.callback_metrics["level"].item(), abs=1e-6)


def test_hooks_around_the_backward_pass() -> None:
    class Noting(Callback):
        def __init__(self) -> None:
            self.events: list[str] = []

        def on_before_zero_grad(self, *args: Any) -> None:
            self.events.append("before zero_grad")

        def on_before_backward(self, *args: Any) -> None:
            self.events.append("before backward")

        def on_after_backward(self, *args: Any) -> None:
            self.events.append("after backward")

    noting = Noting()
    trained(Net(forward=4), count=8, callbacks=noting)
    assert noting.events == ["before zero_grad", "before backward", "before backward", "after backward"]


def test_single_sample_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        trained(Net(backward=0))
    text = str(caught.value)
    assert text.startswith("Out of memory in the backward pass of training (epoch 0, batch 0, global step 0).")
    assert "on_out_of_memory='split_batch' could not help: a single sample needs more memory than there is" in text
    assert "['x']: float32 [1, 3]" in text


def test_batch_that_cannot_be_cut_is_an_error() -> None:
    class Odd(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            torch.empty(2**46)

    loader = DataLoader([{"x": torch.zeros(4, 3), "y": torch.zeros(3)}], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"could not help: the tensors of the batch have different lengths: \[3, 4\]"):
        quiet(on_out_of_memory="split_batch").fit(Odd(), loader)


def test_other_errors_pass() -> None:
    class Wrong(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        trained(Wrong())


def test_manual_optimization_is_refused() -> None:
    module = Net()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="on_out_of_memory='split_batch' needs automatic optimization"):
        trained(module)


@pytest.mark.parametrize("value", ["split", None, True])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"on_out_of_memory=.*: accepted are 'raise' and 'split_batch'\."):
        quiet(on_out_of_memory=value)


def test_parts_are_checked_for_what_is_not_finite() -> None:
    from lightning.pytorch.loops.finite import NonFiniteError

    data = Data(22)
    data.x[12, 0] = INF  # in the first half of the second batch
    trainer = quiet(on_out_of_memory="split_batch", on_nonfinite="error")
    with pytest.raises(NonFiniteError, match=r"in epoch 0, batch 1 .*The batch itself holds values that are not finite, in `batch\['x'\]`"):
        with pytest.warns(RuntimeWarning, match="Memory ran out"):
            trainer.fit(Net(forward=4), DataLoader(data, batch_size=8))


# ---- several processes -----------------------------------------------------------------------------------------------


def in_processes(rank: int, size: int, ranks: list[int], arguments: dict[str, Any], policy: str) -> Any:
    module = Net(backward=2 if ranks else INF, ranks=ranks)
    torch.manual_seed(11)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = joined(on_out_of_memory=policy, ddp={"find_unused_parameters": True}, **arguments)
        trainer.fit(module, DataLoader(Data(24), batch_size=4))
    told = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    gradients = [[gradient.tolist() for gradient in step] for step in module.gradients]
    return [[p.tolist() for p in module.parameters()], gradients, module.sizes, told]


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
@pytest.mark.parametrize("ranks", [[], [1], [0, 1]])
def test_processes_may_need_different_numbers_of_parts(ranks: list[int], arguments: dict[str, Any]) -> None:
    plain = run(in_processes, 2, [], arguments, "raise", timeout=30)
    split = run(in_processes, 2, ranks, arguments, "split_batch", timeout=30)
    for rank, (weights, gradients, sizes, told) in enumerate(split):
        assert set(sizes[1:]) == ({2} if rank in ranks else {4})
        assert weights == split[0][0]
        for found, expected in zip(weights, plain[0][0]):
            assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=TOLERANCE)
        for step, expected_step in zip(gradients, plain[0][1]):
            assert len(step) == len(expected_step)
        assert len(told) == (rank in ranks)


def refused(rank: int, size: int, kind: str) -> None:
    if kind == "fsdp":
        trainer = quiet(strategy=fsdp(size), devices=size, on_out_of_memory="split_batch")
    elif kind == "hook":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        trainer = joined(ddp={"ddp_comm_hook": fp16_compress_hook}, on_out_of_memory="split_batch")
    else:
        trainer = joined(on_out_of_memory="split_batch", sync_batchnorm=True)
    trainer.fit(Net(norm=True), DataLoader(Data(24), batch_size=4))


@pytest.mark.parametrize(
    ("kind", "said"),
    [("fsdp", "FSDPStrategy needs all processes"), ("hook", "`ddp_comm_hook` takes"), ("norm", "SyncBatchNorm needs all processes")],
)
def test_strategies_whose_processes_must_keep_in_step_are_refused(kind: str, said: str) -> None:
    for outcome in run_to_end(refused, 2, kind, timeout=20):
        assert outcome.error == "MisconfigurationException", outcome.trace
        assert said in outcome.message


# ---- a real limit ----------------------------------------------------------------------------------------------------

PROGRAM = """
import resource, sys
sys.path.insert(0, {helpers!r})
import torch
from trainers import quiet
from lightning.pytorch import LightningModule
torch.set_num_threads(1)

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(100, 100)
        self.sizes = []

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch))
        hidden = batch
        for _ in range(120):  # twice 4.8 MB each for the whole batch: more than 1 GB
            hidden = torch.tanh(hidden + self.layer.weight[0])
        return self.layer(hidden).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_before_optimizer_step(self, optimizer):
        self.norm = self.layer.weight.grad.norm().item()

def trained(policy):
    module = Net()
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    quiet(on_out_of_memory=policy).fit(module, loader)
    return module

data = [torch.randn(12_000, 100, generator=torch.Generator().manual_seed(index)) for index in range(2)]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, unlimited[1]))
split = trained("split_batch")
resource.setrlimit(resource.RLIMIT_AS, unlimited)
whole = trained("raise")
print(whole.sizes, split.sizes, abs(whole.norm - split.norm) / whole.norm)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are kept by Linux")
def test_real_limit_of_memory_is_kept_to() -> None:
    helpers = str(Path(__file__).resolve().parents[2] / "helpers")
    command = [sys.executable, "-c", PROGRAM.format(helpers=helpers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    sizes, _, rest = done.stdout.strip().rpartition("] ")
    assert sizes.startswith("[12000, 12000] [12000, 6000,")
    assert float(rest) < 1e-5
    assert "Memory ran out, so training batches are run in parts of at most" in done.stderr


# ---- loaders of different lengths ------------------------------------------------------------------------------------


def uneven(rank: int, size: int, policy: str) -> Any:
    module = Net(backward=2 if policy == "split_batch" else INF, norm=False)
    data = Data(8 + 8 * rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        trainer = joined(on_out_of_memory=policy, uneven_inputs="join", use_distributed_sampler=False, ddp={"find_unused_parameters": True})
        trainer.fit(module, DataLoader(data, batch_size=4))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return [[p.tolist() for p in module.parameters()], metrics, module.sizes]


def test_processes_that_ran_out_of_data_repeat_their_batch_in_parts() -> None:
    plain, split = run(uneven, 2, "raise", timeout=30), run(uneven, 2, "split_batch", timeout=30)
    for (weights, metrics, _), (others, other_metrics, sizes) in zip(plain, split):
        assert set(sizes[1:]) == {2}
        assert other_metrics == pytest.approx(metrics, abs=1e-6)
        for one, other in zip(weights, others):
            assert torch.allclose(torch.tensor(one), torch.tensor(other), atol=TOLERANCE)


# ---- other ways to step ----------------------------------------------------------------------------------------------


class Stepping(Net):
    """Steps by itself, and not through the closure."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.step()


class Searching(Net):
    """Calls its closure several times in a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass


@pytest.mark.parametrize("kind", [Stepping, Searching])
def test_users_steps_and_closures_that_run_again(kind: Any) -> None:
    whole, split = kind(), kind(backward=3)
    trained(whole, on_out_of_memory="raise")
    trained(split)
    difference = max(float((a - b).detach().abs().max()) for a, b in zip(whole.parameters(), split.parameters()))
    assert difference < 10 * TOLERANCE  # LBFGS divides by differences of gradients
    assert set(split.sizes[1:]) <= {4, 3, 2}


def skipping(rank: int, size: int) -> Any:
    module = Net(backward=2, ranks=[rank])
    data = Data(24)
    data.x[9, 0] = INF  # a sample of one process, in its second batch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = joined(
            on_out_of_memory="split_batch", on_nonfinite="skip", ddp={"find_unused_parameters": True}, use_distributed_sampler=False
        )
        trainer.fit(module, DataLoader(torch.utils.data.Subset(data, range(rank * 12, rank * 12 + 12)), batch_size=4))
    told = [str(w.message) for w in caught if "not finite" in str(w.message)]
    return [[p.tolist() for p in module.parameters()], told, len(module.gradients[0]), len(module.gradients[2])]


def test_updates_of_parts_are_left_out_in_all_processes() -> None:
    (weights, told, *rest), (others, nothing, *_) = run(skipping, 2, timeout=30)
    assert weights == others
    assert all(torch.tensor(each).isfinite().all() for each in weights)
    assert len(told) == 1
    assert "Rank 0: The loss is not finite" in told[0]
    assert nothing == []
    assert rest == [4, 0]
