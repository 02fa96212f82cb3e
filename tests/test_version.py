"""The version, the refusal to stand next to upstream, and the names of the package itself."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import lightning
from lightning._version import KERAUNOS_VERSION, __version__, refuse_mixture

SOURCE = str(Path(lightning.__file__).parents[1])


def installed(folder: Path, name: str = "lightning", version: str = "2.6.6") -> Path:
    """What an installer leaves of a distribution, in a folder that stands on ``sys.path``."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def run(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([SOURCE, *map(str, folders)])
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


# ---- the version -------------------------------------------------------------------------------------------------------


def test_the_version_passes_for_the_release_whose_behaviour_it_has() -> None:
    version = Version(__version__)
    assert version >= Version("2.6.6")
    assert version < Version("2.7")
    assert version.local == f"keraunos.{KERAUNOS_VERSION}"
    assert str(version) == __version__
    assert lightning.__version__ == importlib.import_module("lightning.pytorch").__version__ == __version__


# ---- next to upstream ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["lightning", "lightning.pytorch", "lightning.fabric.utilities.seed"])
def test_next_to_upstream_importing_anything_is_one_clear_error(module: str, tmp_path: Path) -> None:
    done = run(f"import {module}", installed(tmp_path / "site"))
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ImportError: Keraunos ")
    assert "and the distribution 'lightning' 2.6.6" in error
    assert str(tmp_path / "site") in error
    assert "'pip uninstall lightning keraunos', then 'pip install keraunos'" in error
    assert "During handling" not in done.stderr


@pytest.mark.parametrize("name", ["pytorch-lightning", "lightning-fabric", "lightning-utilities", "torch-lightning"])
def test_distributions_with_packages_of_their_own_do_not_matter(name: str, tmp_path: Path) -> None:
    done = run("import lightning; print(lightning.__version__)", installed(tmp_path, name))
    assert (done.returncode, done.stdout.strip()) == (0, __version__), done.stderr


def test_the_check_sees_what_is_installed_when_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_mixture()
    monkeypatch.syspath_prepend(installed(tmp_path / "site", version="3.0.0"))
    with pytest.raises(ImportError, match=r"'lightning' 3\.0\.0"):
        refuse_mixture()


# ---- names -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lightning.__all__)
def test_every_name_is_that_of_its_home(name: str) -> None:
    found: Any = getattr(lightning, name)
    home = "lightning.fabric" if name == "Fabric" else "lightning.pytorch"
    assert found is getattr(importlib.import_module(home), name)


def test_the_package_loads_nothing_until_a_name_is_used() -> None:
    code = (
        "import sys, lightning\n"
        "assert 'torch' not in sys.modules\n"
        "assert lightning.pytorch.Trainer is lightning.Trainer\n"
        "assert lightning.fabric.__name__ == 'lightning.fabric'\n"
        "assert 'torch' in sys.modules\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lightning' has no attribute 'Trainers'"):
        lightning.Trainers  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Trainers'"):
        exec("from lightning import Trainers")


def test_names_can_be_listed_and_imported_at_once() -> None:
    assert {"Trainer", "LightningModule", "pytorch", "fabric"} <= set(dir(lightning))
    names: dict[str, Any] = {}
    exec("from lightning import *", names)
    assert set(lightning.__all__) <= set(names)
