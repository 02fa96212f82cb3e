"""Scripts whose processes the Trainer, or torchrun, starts: each is one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from trainers import Regression, Vectors, quiet


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "MASTER_", "LOCAL_RANK", "NODE_RANK", "KERAUNOS_")):
            monkeypatch.delenv(name)


HELPERS = str(Path(__file__).resolve().parents[2] / "helpers")

SCRIPT = f"""
import sys, os, json
sys.path.insert(0, {HELPERS!r})
import torch
from trainers import Evaluated, Numbers, Regression, Vectors, Weight, loader, quiet
from torch.utils.data import DataLoader
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

torch.set_num_threads(1)
seed_everything(1, workers=True, verbose=False)
if "fails" in sys.argv:
    class Fails(Weight):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_rank == 1:
                raise ZeroDivisionError("the user's own")
            return super().training_step(batch, batch_idx)
    quiet(strategy="ddp", devices=2).fit(Fails(), DataLoader(Numbers(4)))

class Draws(Numbers):
    def __getitem__(self, index):
        return torch.rand(1)

class Notes(Evaluated):
    def predict_step(self, batch, batch_idx):
        return batch

checkpoint = ModelCheckpoint("saved", save_last=True)
trainer = quiet(strategy="ddp", devices=2, callbacks=checkpoint, enable_checkpointing=True, logger=CSVLogger("logs"))
model = Regression()
trainer.fit(model, loader(Vectors(30), 6, 2))
evaluated = Evaluated()
results = quiet(strategy="ddp", devices=2).test(evaluated, DataLoader(Numbers(5)), verbose=False)
drawn = quiet(strategy="ddp", devices=2).predict(Notes(), DataLoader(Draws(4), num_workers=1))
trainer.print("printed once")
sys.stdout.write("@" + json.dumps({{
    "rank": trainer.global_rank, "weight": model.net[0].weight.flatten().tolist(), "results": results,
    "paths": [checkpoint.best_model_path, checkpoint.last_model_path, trainer.log_dir], "drawn": [float(each) for each in drawn],
}}) + "\\n")
sys.stdout.flush()
"""


def run_script(tmp_path: Path, *command: str, arguments: tuple[str, ...] = (), timeout: float = 90) -> tuple[int, str, str]:
    """Run the script to its end, and return its exit code and what it has printed."""
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, *command, "train.py", *arguments]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(whole, cwd=tmp_path, env=environment, start_new_session=True, **pipes)
    try:
        return (*process.communicate(timeout=timeout), process.returncode)[::-1]  # type: ignore[return-value]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("\n".join(("still running", *process.communicate()))) from None


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")


@pytest.mark.parametrize("command", [(), TORCHRUN], ids=["ddp", "torchrun"])
def test_script_is_one_run_in_two_processes(tmp_path: Path, command: tuple[str, ...]) -> None:
    code, error, output = run_script(tmp_path, *command)
    assert code == 0, error
    ranks = sorted((json.loads(line[1:]) for line in output.splitlines() if line.startswith("@")), key=lambda result: result["rank"])
    assert [result["rank"] for result in ranks] == [0, 1]
    assert output.count("printed once") == 1
    assert ranks[0]["weight"] == ranks[1]["weight"]
    assert ranks[0]["paths"] == ranks[1]["paths"]
    assert ranks[0]["results"] == ranks[1]["results"] == [{"test": 2.0}]
    drawn = [number for result in ranks for number in result["drawn"]]
    assert len(set(drawn)) == 4  # the workers of each process have seeds of their own
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["epoch=0-step=5.ckpt", "last.ckpt"]
    assert [path.name for path in (tmp_path / "logs" / "lightning_logs").iterdir()] == ["version_0"]
    torch.manual_seed(1)
    alone = Regression()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))  # seed_everything(1) decides on the shuffling
    quiet().fit(alone, DataLoader(Vectors(30).samples[order], batch_size=6))  # type: ignore[arg-type]
    torch.testing.assert_close(torch.tensor(ranks[0]["weight"]), alone.net[0].weight.flatten(), atol=1e-6, rtol=0)


def test_error_of_one_rank_ends_the_script_and_names_the_rank(tmp_path: Path) -> None:
    code, error, _ = run_script(tmp_path, arguments=("fails",))
    assert code != 0
    assert "rank 1" in error.lower()
    assert "ZeroDivisionError: the user's own" in error
