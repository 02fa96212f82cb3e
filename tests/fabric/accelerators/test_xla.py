"""TPUs as the libraries report them, and the CPU in their place."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from xla_devices import IS_MISSING, REASON, run

from lightning.fabric.accelerators import MPSAccelerator, XLAAccelerator, xla
from lightning.fabric.accelerators.registry import choose_accelerator
from lightning.fabric.utilities.exceptions import MisconfigurationException

needs_xla = pytest.mark.skipif(IS_MISSING, reason=REASON)


@pytest.fixture
def pci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make devices of some vendors."""
    monkeypatch.setattr(xla, "PCI_DEVICES", tmp_path)

    def make(*vendors: str) -> None:
        for index, vendor in enumerate(vendors):
            folder = tmp_path / f"0000:00:0{index}.0"
            folder.mkdir()
            (folder / "vendor").write_text(f"{vendor}\n")

    return make


def test_a_host_without_googles_devices_has_no_tpus(pci: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    pci("0x10de", "0x8086")
    assert not xla.has_tpu_chips()
    assert xla.count_tpus() == XLAAccelerator.auto_device_count() == 0
    assert not XLAAccelerator.is_available()


def test_googles_vendor_number_makes_torch_xla_be_asked(pci: Any) -> None:
    pci("0x8086", "0x1ae0")
    assert xla.has_tpu_chips()


def what_torch_xla_reports(folder: str) -> dict[str, Any]:
    """On a host that has a device of Google's which is no TPU."""
    from torch_xla._internal import tpu

    xla.PCI_DEVICES = Path(folder)
    return {
        "chips": tpu.num_available_chips(),
        "counted": (xla.has_tpu_chips(), xla.count_tpus()),
        "stand-ins": (XLAAccelerator.is_available(), XLAAccelerator.auto_device_count(), XLAAccelerator.is_stand_in()),
        "chosen": (choose_accelerator("tpu").name(), choose_accelerator("auto").name()),
        "devices": [str(device) for device in XLAAccelerator.get_parallel_devices(XLAAccelerator.parse_devices("auto"))],
        "statistics": XLAAccelerator().get_device_stats("xla:0"),
    }


@needs_xla
def test_the_cpu_stands_in_where_it_is_told_to(pci: Any, tmp_path: Path) -> None:
    pci("0x1ae0")
    found = run(what_torch_xla_reports, str(tmp_path), devices=3)
    assert found["counted"] == (True, found["chips"])
    assert found["stand-ins"] == (True, 3, True)
    assert found["chosen"] == ("tpu", "cuda" if torch.cuda.is_available() else "mps" if MPSAccelerator.is_available() else "cpu")
    assert found["devices"] == ["xla:0", "xla:1", "xla:2"]
    assert found["statistics"] == {}


@needs_xla
def test_without_tpus_and_without_stand_ins_it_says_what_to_do(pci: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    with pytest.raises(MisconfigurationException, match=r'accelerator="tpu".*no such device.*set the environment variable PJRT_DEVICE=CPU'):
        choose_accelerator("tpu")


def warned() -> str:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        XLAAccelerator().setup_device(torch.device("xla", 0))
    return str(caught[0].message)


@needs_xla
def test_it_says_that_the_cpu_stands_in() -> None:
    assert 'accelerator="tpu" computes on the CPU' in run(warned)


def test_looking_for_tpus_imports_no_torch_xla() -> None:
    code = (
        "import sys\nfrom lightning.fabric.accelerators.registry import choose_accelerator\n"
        "choose_accelerator('auto')\nprint('torch_xla' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_mps_is_there_where_torch_and_the_processor_say_so() -> None:
    assert MPSAccelerator.is_available() == (torch.backends.mps.is_available() and platform.machine() == "arm64")
    if MPSAccelerator.is_available():
        assert MPSAccelerator.parse_devices("auto") == [0]
    else:
        with pytest.raises(MisconfigurationException, match="this machine offers none"):
            MPSAccelerator.parse_devices(1)
