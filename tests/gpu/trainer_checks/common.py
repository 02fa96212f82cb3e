"""What the checks share: the device, models with data, hand-written loops, and the runner."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lightning.pytorch as L
from lightning.fabric.precision import MixedPrecision

AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
Batch = tuple[Tensor, Tensor]


class Skip(Exception):
    """What a check raises that this machine cannot run."""


# ---- the device ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the checks run."""

    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def require_cuda(self) -> None:
        if not self.is_cuda:
            raise Skip("needs CUDA")

    def trainer(self, precision: str | None = "32-true", **options: Any) -> L.Trainer:
        """A quiet trainer on this device."""
        plain: dict[str, Any] = {
            "accelerator": self.device.type, "devices": [self.device.index or 0] if self.is_cuda else 1, "precision": precision,
            "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        }  # fmt: skip
        if precision == "16-mixed" and not self.is_cuda:  # the trainer would take bf16-mixed
            plain |= {"precision": None, "plugins": MixedPrecision("16-mixed", "cpu")}
        return L.Trainer(**(plain | options))

    def scaled(self, **scaler: Any) -> dict[str, Any]:
        """Arguments of :meth:`trainer` for 16-mixed with a scaler of one's own."""
        plugin = MixedPrecision("16-mixed", self.device, scaler=torch.amp.GradScaler(self.device.type, **scaler))
        return {"precision": None, "plugins": plugin}

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def sleep(self, seconds: float) -> None:
        """Keep the GPU, not the host, busy for about this time."""
        if self.is_cuda:
            torch.cuda._sleep(int(seconds * 1.8e9))  # cycles of a clock near 1.8 GHz

    def sync_errors(self, on: bool) -> None:
        """Let every operation that makes the host wait for the GPU raise."""
        if self.is_cuda:
            torch.cuda.set_sync_debug_mode("error" if on else "default")


# ---- models and data ----------------------------------------------------------------------------------------------


def mlp(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Dropout(dropout), nn.Linear(128, 10))


def conv(dropout: float = 0.0) -> nn.Module:
    # Strides in place of pooling, whose backward pass is not deterministic on CUDA.
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(512, 10),
    )  # fmt: skip


NETS = {"mlp": mlp, "conv": conv}


class Classifier(L.LightningModule):
    """A small network for 8 x 8 images.

    Args:
        net: ``"mlp"`` or ``"conv"``.
        fused: use the fused AdamW.
        dropout: before the last layer.
        log: keywords for ``self.log`` of the training loss; None logs nothing.
        schedule: lower the learning rate after each step.
        eps: of AdamW; its usual one is 0 in float16.
    """

    def __init__(
        self,
        net: str = "mlp",
        fused: bool = True,
        dropout: float = 0.0,
        log: dict[str, Any] | None = None,
        schedule: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = NETS[net](dropout)
        self.losses: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.hparams.log is not None:
            self.log("loss", loss, **self.hparams.log)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        outputs = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(outputs, batch[1]))
        self.log("val_acc", (outputs.argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return {"logits": self(batch[0]), "nested": [batch[1], "text"], "index": batch_idx}

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self.parameters(), self.hparams.fused, self.hparams.eps)
        if not self.hparams.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def weights(self) -> list[Tensor]:
        """Parameters and buffers, on the CPU."""
        return [value.detach().cpu().clone() for value in self.state_dict().values()]


def adamw(parameters: Any, fused: bool, eps: float = 1e-8) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, eps=eps, fused=fused)


def seeded(net: str = "mlp", **options: Any) -> Classifier:
    """A model whose weights are the same in each call."""
    torch.manual_seed(0)
    return Classifier(net, **options)


class Batches:
    """A loader of ready batches; a list would be a list of loaders."""

    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def batches(count: int = 10, size: int = 32, device: torch.device | str = "cpu", pin: bool = False) -> Batches:
    """Random images whose class can be learned."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(size, 1, 8, 8, generator=generator) for _ in range(count)]
    pairs = [(x, x.flatten(1)[:, :10].argmax(1)) for x in images]
    if pin:
        pairs = [(x.pin_memory(), y.pin_memory()) for x, y in pairs]
    return Batches([(x.to(device), y.to(device)) for x, y in pairs])


def by_hand(
    place: Place,
    model: Classifier,
    data: Batches,
    precision: str = "32-true",
    epochs: int = 1,
    clip: tuple[str, float] | None = None,
    accumulate: int = 1,
) -> tuple[list[float], list[Tensor]]:
    """The training that PyTorch's documentation writes; returns losses and weights."""
    device = place.device
    model = model.to(device).train()
    optimizer = adamw(model.parameters(), model.hparams.fused, model.hparams.eps)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "16-mixed")
    losses = []
    for index in range(epochs * len(data)):
        index %= len(data)
        x, y = (tensor.to(device, non_blocking=True) for tensor in data[index])
        with torch.autocast(device.type, dtype=AUTOCAST[precision]) if precision in AUTOCAST else nullcontext():
            loss = nn.functional.cross_entropy(model(x), y)
        if index % accumulate == 0:
            optimizer.zero_grad()
        window = min(accumulate, len(data) - (index - index % accumulate))
        scaler.scale(loss / window).backward()
        if (index + 1) % accumulate == 0 or index + 1 == len(data):
            if clip is not None:
                scaler.unscale_(optimizer)
            if clip is not None and clip[0] == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), clip[1])
            elif clip is not None:
                nn.utils.clip_grad_value_(model.parameters(), clip[1])
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.detach())
    return [loss.item() for loss in losses], model.weights()


def clipping(clip: tuple[str, float] | None) -> dict[str, Any]:
    """The trainer's arguments for the clipping that :func:`by_hand` takes."""
    return {} if clip is None else {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}


def assert_equal(losses: list[Tensor], their_losses: list[Any], weights: list[Tensor], their_weights: list[Tensor]) -> None:
    """Bit by bit."""
    pairs = [(float(a), float(b)) for a, b in zip(losses, their_losses, strict=True)]
    different = [(index, *pair) for index, pair in enumerate(pairs) if pair[0] != pair[1]]
    assert not different, f"{len(different)} of {len(pairs)} losses differ, the first at step {different[0][0]}: {different[0][1:]}"
    differences = [(a - b).abs().max().item() for a, b in zip(weights, their_weights, strict=True) if not torch.equal(a, b)]
    assert not differences, f"{len(differences)} of {len(weights)} weights differ, by up to {max(differences)}"


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms only, inside this context."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_python(arguments: list[str], **environment: str) -> str:
    """Run Python as this process was started; returns what it printed.

    Args:
        arguments: of the interpreter.
        environment: variables to set.
    """
    flags = ["-S"] if sys.flags.no_site else []
    done = subprocess.run(
        [sys.executable, *flags, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=280
    )
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}: " + " | ".join(done.stderr.strip().splitlines()[-4:]))
    return done.stdout


# ---- the runner ---------------------------------------------------------------------------------------------------

Check = tuple[str, Callable[[], Any]]


class Terminal(io.StringIO):
    """A standard output that says it is a terminal, so that progress bars are drawn."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@dataclass
class Outcome:
    """How a check went."""

    name: str
    verdict: str
    seconds: float
    note: str


def run_check(place: Place, name: str, function: Callable[[], Any]) -> Outcome:
    """Run one check in a fresh state, keep what it prints to itself, and print one line."""
    start = time.perf_counter()
    screen, verdict, details = Terminal(), "PASS", ""
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            note = function() or ""
            place.synchronize()
    except Skip as skip:
        verdict, note = "SKIP", str(skip)
    except Exception as error:
        verdict, note = "FAIL", f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        details = traceback.format_exc() + "".join(f"\n    | {line}" for line in screen.getvalue().splitlines()[-15:])
    finally:
        place.sync_errors(False)
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
    outcome = Outcome(name, verdict, time.perf_counter() - start, note)
    print(f"{verdict}  {name}  ({outcome.seconds:.1f} s)" + (f"  {note}" if note else ""))
    if details:
        print(details, file=sys.stderr)
    gc.collect()
    return outcome


def print_table(outcomes: list[Outcome]) -> int:
    """Print all outcomes again, and say how many checks failed."""
    width = max(len(outcome.name) for outcome in outcomes)
    print("\n" + "check".ljust(width) + "  result  seconds")
    for outcome in outcomes:
        reason = f"  {outcome.note:.120}" if outcome.verdict == "FAIL" else ""
        print(f"{outcome.name.ljust(width)}  {outcome.verdict:6}  {outcome.seconds:7.1f}{reason}")
    counts = {verdict: sum(outcome.verdict == verdict for outcome in outcomes) for verdict in ("PASS", "FAIL", "SKIP")}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    print(f"\n{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped, on {where}, torch {torch.__version__}")
    return counts["FAIL"]
