"""Importing the package costs next to nothing over importing torch, counted in modules rather than in seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# What only those pay for who use it. Torch may have loaded some of these itself; what counts is what we add.
HEAVY = (
    "fsspec", "yaml", "tqdm", "rich", "tensorboard", "torchmetrics", "matplotlib", "sklearn", "pandas", "scipy", "onnx", "onnxruntime",
    "jsonargparse", "omegaconf", "packaging", "requests", "aiohttp", "bitsandbytes", "transformer_engine", "torch_xla", "torchvision",
    "torch._dynamo", "torch._inductor", "torch.onnx", "torch.profiler", "torch.utils.tensorboard", "torch.utils.flop_counter",
    "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.device_mesh", "torch.fx",
    "torch.testing", "torch.jit._trace", "numpy.testing", "numpy.random", "importlib.metadata", "multiprocessing.pool", "asyncio",
    "unittest", "http", "urllib.request", "sqlite3", "tkinter", "curses", "pdb", "IPython",
)  # fmt: skip
LIGHT = ("lightning", "typing_extensions")
MOST_MODULES_OF_OURS = 80

BY_HAND = """
import torch
layer = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
for batch in torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2):
    loss = layer(batch).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.manual_seed(1)
"""
FIT = """
from lightning.pytorch import LightningModule, Trainer
class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).sum()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).sum())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)
Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
).fit(Model(), loader, loader)
"""


def modules_added(before: str, code: str) -> set[str]:
    """The names of the modules that ``code`` loads in a fresh interpreter in which ``before`` has run."""
    script = f"""
import sys
{before}
before = set(sys.modules)
{code}
import json
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy(names: set[str]) -> list[str]:
    return sorted(name for name in names if any(name == package or name.startswith(f"{package}.") for package in HEAVY))


def foreign(names: set[str]) -> list[str]:
    """Modules of other distributions; torch and the standard library are judged by the list above."""
    return sorted(name for name in names if name.split(".")[0] not in {*LIGHT, *sys.stdlib_module_names, "torch"})


@pytest.fixture(scope="module")
def added_by_import() -> set[str]:
    """What ``import lightning.pytorch`` adds to ``import torch``."""
    return modules_added("import torch", "import lightning.pytorch")


def test_importing_the_package_loads_nothing_heavy(added_by_import: set[str]) -> None:
    assert "lightning.pytorch.trainer.trainer" in added_by_import
    assert heavy(added_by_import) == []


def test_importing_the_package_loads_no_other_distribution(added_by_import: set[str]) -> None:
    assert foreign(added_by_import) == []


def test_importing_the_package_loads_few_modules(added_by_import: set[str]) -> None:
    assert len([name for name in added_by_import if name.startswith("lightning")]) <= MOST_MODULES_OF_OURS


def test_importing_the_top_level_loads_neither_torch_nor_the_trainer() -> None:
    added = modules_added("", "import lightning")
    assert not any(name.startswith(("torch", "lightning.pytorch", "lightning.fabric")) for name in added)


def test_importing_the_packages_of_parts_loads_nothing_heavy() -> None:
    packages = ("callbacks", "loggers", "profilers", "utilities", "strategies", "accelerators", "plugins")
    added = modules_added("import torch", "\n".join(f"import lightning.pytorch.{package}" for package in packages))
    assert heavy(added) + foreign(added) == []


def test_a_run_without_extras_loads_nothing_heavier_than_a_loop_by_hand() -> None:
    added = modules_added(BY_HAND, FIT)
    assert heavy(added) + foreign(added) == []
