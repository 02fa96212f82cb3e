"""Run a function in a fresh interpreter whose XLA devices are CPU devices, and collect what it returns or raises.

torch_xla has to be the first in a process to compute gradients, and a process that has used a device can't start those of
others. So nothing of it runs in the process of the tests. Use it as ``outcome = run(function, ...)``; the function must stand at
the top of its file, and its arguments and result must be picklable.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
REASON = "torch_xla is not installed; `make test-xla` makes an environment that has it, and runs these tests"
IS_MISSING = importlib.util.find_spec("torch_xla") is None


def run(function: Callable[..., Any], *arguments: Any, devices: int = 1, timeout: float = 120, **variables: str) -> Any:
    """What the function returned.

    Args:
        function: called with the arguments.
        arguments: can be pickled.
        devices: the number of CPU devices; where there are several, each is a thread that the function has to launch.
        timeout: in seconds.
        variables: for the environment.

    Raises:
        AssertionError: if it raised, died, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        sent, received = Path(folder) / "sent", Path(folder) / "received"
        sent.write_bytes(pickle.dumps((sys.modules[function.__module__].__file__, function.__qualname__, arguments)))
        environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices), "OMP_NUM_THREADS": "1", **variables}
        command = [sys.executable, str(HERE), str(sent), str(received)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=os.getcwd())
        assert received.exists(), f"It died with exit code {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        value, trace = pickle.loads(received.read_bytes())
        assert not trace, f"{trace}\n{done.stderr[-3000:]}"
        return value


def _load(path: str, qualname: str) -> Callable[..., Any]:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be pickled,
    sys.path.append(str(Path(path).parent))  # and found by processes that it spawns
    spec.loader.exec_module(module)
    return getattr(module, qualname)  # type: ignore[no-any-return]


def _main(sent: Path, received: Path) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(1)
    path, qualname, arguments = pickle.loads(sent.read_bytes())
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "PJRT_DEVICE=CPU is set")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch_xla's own
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # of torch 2.9's distributed checkpoints
    try:
        outcome: Any = _load(path, qualname)(*arguments), ""
    except BaseException:
        outcome = None, traceback.format_exc()
    received.write_bytes(pickle.dumps(outcome))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
