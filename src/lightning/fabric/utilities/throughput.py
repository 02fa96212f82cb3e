"""How much work a training loop gets done per second, and what share of the device's peak that is."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lightning.fabric.utilities.rank_zero import rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from lightning.fabric.fabric import Fabric

__all__ = ["Throughput", "ThroughputMonitor", "get_available_flops", "measure_flops"]

T = TypeVar("T", bound=float)


@dataclass(frozen=True, slots=True)
class _Record:
    time: float
    batches: int
    samples: int
    lengths: int | None
    flops: int | None


class Throughput:
    """Rates over the last few updates.

    ===============================  ==========================================================================
    Key                              Meaning
    ===============================  ==========================================================================
    ``batches_per_sec``              batches of all devices per second
    ``samples_per_sec``              samples of all devices per second
    ``items_per_sec``                items (such as tokens) of all devices per second, where lengths are given
    ``flops_per_sec``                operations of all devices per second, where flops are given
    ``device/...``                   the same for this device alone
    ``device/mfu``                   operations of this device as a share of ``available_flops``
    ``time, batches, samples``       what the last update said, and ``lengths`` where given
    ===============================  ==========================================================================

    The keys for all devices appear with more than one device, and suppose that the others do as much as this one.

    Args:
        available_flops: the peak of this device, in operations per second; see :func:`get_available_flops`.
        world_size: how many devices train.
        window_size: how many updates the rates look back over; until there are so many, there are no rates.
        separator: stands behind ``device``.

    Raises:
        ValueError: if ``world_size`` is less than 1 or ``window_size`` less than 2.

    Example::

        >>> throughput = Throughput(window_size=2)
        >>> throughput.update(time=1.0, batches=1, samples=8)
        >>> throughput.update(time=1.5, batches=2, samples=16)
        >>> throughput.compute()["device/samples_per_sec"]
        16.0
    """

    def __init__(self, available_flops: float | None = None, world_size: int = 1, window_size: int = 100, separator: str = "/") -> None:
        if world_size < 1:
            raise ValueError(f"Throughput(world_size={world_size}): there must be at least one device.")
        if window_size < 2:
            raise ValueError(f"Throughput(window_size={window_size}): a rate needs a window of at least two updates.")
        self.available_flops = available_flops
        self.world_size = world_size
        self.separator = separator
        self._records: deque[_Record] = deque(maxlen=window_size)

    def update(self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: int | None = None) -> None:
        """Add what is done by now.

        Args:
            time: seconds since the start.
            batches: batches since the start, on this device.
            samples: samples since the start, on this device.
            lengths: items in those samples since the start, such as tokens.
            flops: operations since the last update, on this device.

        Raises:
            ValueError: if a total is not above that of the last update, or there are fewer samples than batches, or fewer
                items than samples. Nothing is added then.
        """
        if samples < batches:
            raise ValueError(f"Throughput.update: {samples} samples can't make {batches} batches; both count from the start.")
        if lengths is not None and lengths < samples:
            raise ValueError(f"Throughput.update: {samples} samples can't have lengths of {lengths} in all; both count from the start.")
        record = _Record(time, batches, samples, lengths, flops)
        if self._records:
            last = self._records[-1]
            for name in ("time", "batches", "samples", "lengths"):
                before, now = getattr(last, name), getattr(record, name)
                if before is not None and now is not None and now <= before:
                    raise ValueError(f"Throughput.update({name}={now}): totals since the start grow, and the last one was {before}.")
        self._records.append(record)

    def compute(self) -> dict[str, float]:
        """What the last update said, and the rates once the window is full. Empty before the first update."""
        if not self._records:
            return {}
        first, last = self._records[0], self._records[-1]
        metrics: dict[str, float] = {"time": last.time, "batches": last.batches, "samples": last.samples}
        if last.lengths is not None:
            metrics["lengths"] = last.lengths
        if len(self._records) < (self._records.maxlen or 0):
            return metrics
        seconds = last.time - first.time
        rates = {
            "batches_per_sec": (last.batches - first.batches) / seconds,
            "samples_per_sec": (last.samples - first.samples) / seconds,
        }
        if last.lengths is not None and first.lengths is not None:
            rates["items_per_sec"] = (last.lengths - first.lengths) / seconds
        flops = [record.flops for record in list(self._records)[1:]]  # those of the first were done before it
        if None not in flops:
            rates["flops_per_sec"] = sum(flops) / seconds  # type: ignore[arg-type]
        metrics |= {f"device{self.separator}{name}": rate for name, rate in rates.items()}
        if self.world_size > 1:
            metrics |= {name: rate * self.world_size for name, rate in rates.items()}
        if "flops_per_sec" in rates and self.available_flops:
            metrics[f"device{self.separator}mfu"] = rates["flops_per_sec"] / self.available_flops
        return metrics

    def reset(self) -> None:
        """Forget all updates."""
        self._records.clear()


class ThroughputMonitor(Throughput):
    """A :class:`Throughput` that logs through Fabric, on rank 0, and knows the device's peak.

    Args:
        fabric: logs; also tells the device, the precision and how many devices there are.
        kwargs: go to :class:`Throughput`, before what Fabric tells.
    """

    def __init__(self, fabric: Fabric, **kwargs: Any) -> None:
        dtype = compute_dtype(fabric.strategy.precision)
        kwargs.setdefault("available_flops", get_available_flops(fabric.device, dtype))
        kwargs.setdefault("world_size", fabric.world_size)
        super().__init__(**kwargs)
        self._fabric = fabric
        self.step = -1

    @rank_zero_only
    def update(self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: int | None = None) -> None:
        """As :meth:`Throughput.update`; does nothing on other ranks."""
        super().update(time=time, batches=batches, samples=samples, lengths=lengths, flops=flops)

    def compute(self) -> dict[str, float]:
        """As :meth:`Throughput.compute`; empty on other ranks."""
        return super().compute() if rank_zero_only.rank == 0 else {}  # type: ignore[attr-defined]

    def compute_and_log(self, step: int | None = None, **kwargs: Any) -> dict[str, float]:
        """Log what :meth:`compute` returns.

        Args:
            step: for the loggers; None counts the calls.
            kwargs: go to :meth:`compute`.
        """
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return {}
        self.step = self.step + 1 if step is None else step
        metrics = self.compute(**kwargs)
        self._fabric.log_dict(metrics=metrics, step=self.step)
        return metrics

    @rank_zero_only
    def reset(self) -> None:
        """As :meth:`Throughput.reset`."""
        super().reset()


def measure_flops(model: nn.Module, forward_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor] | None = None) -> int:
    """Count the floating point operations of one forward pass, and of the backward pass if there is a loss.

    With model and input on the meta device nothing is really computed.

    Args:
        model: what ``forward_fn`` calls.
        forward_fn: does a forward pass.
        loss_fn: turns its result into a loss, whose ``backward`` is counted too.

    Example::

        >>> with torch.device("meta"):
        ...     model, x = nn.Linear(3, 4), torch.empty(2, 3)
        >>> measure_flops(model, lambda: model(x)), measure_flops(model, lambda: model(x), lambda y: y.sum())
        (48, 96)
    """
    from torch.utils.flop_counter import FlopCounterMode

    del model  # told for the sake of the reader; the counter sees every operation
    with FlopCounterMode(display=False) as counter:
        output = forward_fn()
        if loss_fn is not None:
            loss_fn(output).backward()
    return int(counter.get_total_flops())


# Peak rates by the makers' data sheets in 10^12 operations per second, without sparsity, on matrix units where there are some,
# with float32 accumulation: float64, float32, TF32, float16, bfloat16, int8. The first entry whose words are all in the name holds.
_PEAKS: tuple[tuple[str, tuple[float | None, ...]], ...] = (
    ("gb200", (40, 80, 1250, 2500, 2500, 5000)),
    ("b200", (37, 75, 1125, 2250, 2250, 4500)),
    ("gh200", (67, 67, 494.7, 989.4, 989.4, 1978.9)),
    ("h200 nvl", (60, 60, 417.5, 835, 835, 1670)),
    ("h200", (67, 67, 494.7, 989.4, 989.4, 1978.9)),
    ("h100 nvl", (60, 60, 417.5, 835, 835, 1670)),
    ("h100 pcie", (51, 51, 378, 756, 756, 1513)),
    ("h100", (67, 67, 494.7, 989.4, 989.4, 1978.9)),
    ("h800 pcie", (0.8, 51, 378, 756, 756, 1513)),
    ("h800", (1, 67, 494.7, 989.4, 989.4, 1978.9)),
    ("h20", (1, 44, 74, 148, 148, 296)),
    ("a800", (19.5, 19.5, 156, 312, 312, 624)),
    ("a100", (19.5, 19.5, 156, 312, 312, 624)),
    ("a30", (10.3, 10.3, 82, 165, 165, 330)),
    ("a40", (None, 37.4, 74.8, 149.7, 149.7, 299.3)),
    ("a10g", (None, 35, 35, 70, 70, 140)),
    ("a10", (None, 31.2, 62.5, 125, 125, 250)),
    ("a6000", (None, 38.7, 77.4, 154.8, 154.8, 309.7)),
    ("l40s", (None, 91.6, 183, 362, 362, 733)),
    ("l40", (None, 90.5, 90.5, 181, 181, 362)),
    ("l4", (None, 30.3, 60, 121, 121, 242)),
    ("l20", (None, 59.8, 59.8, 119.5, 119.5, 239)),
    ("v100s", (8.2, 16.4, None, 130, None, None)),
    ("v100 pcie", (7, 14, None, 112, None, None)),
    ("v100", (7.8, 15.7, None, 125, None, None)),
    ("t4", (None, 8.1, None, 65, None, 130)),
    ("6000 ada", (None, 91.1, 182.1, 364.2, 364.2, 728.5)),
    ("rtx 5090", (None, 104.8, 104.8, 209.5, 209.5, 838)),
    ("rtx 4090", (None, 82.6, 82.6, 165.2, 165.2, 660.6)),
    ("rtx 4080 super", (None, 52.2, 52.2, 104.4, 104.4, 418)),
    ("rtx 4080", (None, 48.7, 48.7, 97.5, 97.5, 389.9)),
    ("rtx 3090 ti", (None, 40, 40, 80, 80, 320)),
    ("rtx 3090", (None, 35.6, 35.6, 71, 71, 284)),
    ("rtx 3080 ti", (None, 34.1, 34.1, 68.2, 68.2, 272.8)),
    ("rtx 3080", (None, 29.8, 29.8, 59.5, 59.5, 238)),
    ("rtx 3070", (None, 20.3, 20.3, 40.6, 40.6, 162.6)),
    ("rtx 2080 ti", (None, 13.4, None, 53.8, None, 215.2)),
    ("rtx 2080 super", (None, 11.2, None, 44.6, None, 178.4)),
    ("rtx 2080", (None, 10.1, None, 40.3, None, 161.1)),
    ("quadro rtx 5000", (None, 11.2, None, 89.2, None, 178.4)),
    ("quadro rtx 6000", (None, 16.3, None, 130.5, None, 261)),
    ("titan rtx", (None, 16.3, None, 130.5, None, 261)),
    ("mi325x", (163.4, 163.4, 653.7, 1307.4, 1307.4, 2614.9)),
    ("mi300x", (163.4, 163.4, 653.7, 1307.4, 1307.4, 2614.9)),
)
_COLUMNS = {"float64": 0, "float32": 1, "tf32": 2, "float16": 3, "bfloat16": 4, "int8": 5}
# Of a chip with bfloat16 operands, which float32 ones become unless a higher precision is asked for.
_TPU_PEAKS = {"v2": 45, "v3": 123, "v4": 275, "v5litepod": 197, "v5e": 197, "v5p": 459, "v6e": 918}
_SLOWER_VERSIONS = {"laptop", "mobile", "max"}  # "Max-Q"


def get_available_flops(device: torch.device, dtype: torch.dtype | str) -> int | None:
    """The peak of a GPU or TPU in operations per second, by its maker; None if it is not known.

    Args:
        device: a CUDA (or ROCm) or XLA device.
        dtype: of the operands, such as ``torch.bfloat16`` or ``"int8"``; float32 counts as TF32 where
            ``torch.set_float32_matmul_precision`` allows that.
    """
    if device.type == "xla":
        return _available_flops_of_a_tpu()
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    peaks = next((row for chip, row in _PEAKS if words.issuperset(chip.split())), None)
    if peaks is None or words & _SLOWER_VERSIONS:
        rank_zero_warn(f"The peak of {name!r} is not known, so there is no `mfu`; pass `available_flops` yourself.")
        return None
    kind = str(dtype).removeprefix("torch.")
    if kind == "float32" and torch.get_float32_matmul_precision() != "highest" and peaks[_COLUMNS["tf32"]] is not None:
        kind = "tf32"
    peak = peaks[_COLUMNS[kind]] if kind in _COLUMNS else None
    if peak is None:
        rank_zero_warn(f"The peak of {name!r} for {dtype} is not known, so there is no `mfu`; pass `available_flops` yourself.")
        return None
    return int(peak * 1e12)


def _available_flops_of_a_tpu() -> int | None:
    from torch_xla import runtime
    from torch_xla._internal import tpu

    if runtime.device_type() != "TPU":
        return None
    kind = tpu.get_tpu_type()
    peak = _TPU_PEAKS.get(kind.lower())
    if peak is None:
        rank_zero_warn(f"The peak of a TPU {kind!r} is not known, so there is no `mfu`; pass `available_flops` yourself.")
        return None
    return int(peak * 1e12 / tpu.num_logical_cores_per_chip())  # each of which is a device


def compute_dtype(precision: Any) -> torch.dtype:
    """The type that matrix products are computed in under a precision plugin."""
    name = str(precision.precision)
    if name.startswith("bf16"):
        return torch.bfloat16
    if name.startswith("16"):
        return torch.float16
    if name.startswith("64"):
        return torch.float64
    if name.startswith("32"):
        return torch.float32
    if "float16" in name:  # "transformer-engine-float16"
        return torch.float16
    return torch.bfloat16 if name.startswith("transformer-engine") else torch.get_default_dtype()
