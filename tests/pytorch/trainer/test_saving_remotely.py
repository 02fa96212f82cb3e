"""Checkpoints that go to remote storage by URL: in the memory of fsspec, and, where moto and s3fs are installed, to an S3 server."""

from __future__ import annotations

import errno
import importlib.util
import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest
import torch

from lightning.fabric.checkpoint import seal
from lightning.fabric.checkpoint.generations import generation_of, newest_valid
from lightning.fabric.checkpoint.io import load
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

Make = Callable[..., Any]
LACKS = [name for name in ("moto", "s3fs", "flask") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server of this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.skipif(bool(LACKS), reason=f"not installed: {LACKS}"))])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new place on remote storage."""
    name = f"test-{uuid.uuid4()}"
    if request.param == "s3":
        warn = "ignore:.*:DeprecationWarning:(boto|aiobotocore|s3fs|dateutil).*"
        request.node.add_marker(pytest.mark.filterwarnings(warn))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("server"))
        fsspec.filesystem("s3").mkdir(name)
        yield f"s3://{name}"
        fsspec.filesystem("s3").rm(name, recursive=True)
        fsspec.filesystem("s3").clear_instance_cache()
        return
    yield f"memory://{name}"
    if fsspec.filesystem("memory").exists(f"/{name}"):
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def names(url: str) -> list[str]:
    """What lies there, as another program sees it."""
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    return sorted(path[len(root) :].lstrip("/") for path in filesystem.find(root))


@pytest.fixture
def make(make_trainer: Make) -> Make:
    return lambda *callbacks, **options: make_trainer(callbacks=list(callbacks), **{"enable_checkpointing": None, **options})


class Crash(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5:
            raise ZeroDivisionError


@pytest.mark.filterwarnings("ignore:The checkpoint folder .* is not empty")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("wanted", ["last", "best"])
def test_the_best_and_the_last_are_there_and_a_run_goes_on_from_them(
    Weight: Any, make: Make, numbers: Make, url: str, background: bool, wanted: str
) -> None:
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(f"{url}/run", "{step}", monitor="step", mode="max", save_top_k=2, save_last=True, every_n_train_steps=1)

    first = saving()
    make(first, async_checkpointing=background).fit(Weight(), numbers(4))
    assert names(url) == ["run/last.ckpt", "run/step=3.ckpt", "run/step=4.ckpt"]
    assert first.best_model_path == f"{url}/run/step=4.ckpt"
    assert first.last_model_path == f"{url}/run/last.ckpt"
    assert load(first.best_model_path)["global_step"] == 4
    expected, model = Weight(), Weight()
    make(enable_checkpointing=False, max_epochs=2).fit(expected, numbers(4))
    trainer = make(saving(), async_checkpointing=background, max_epochs=2)
    trainer.fit(model, numbers(4), ckpt_path="last" if wanted == "last" else first.best_model_path)
    assert trainer.global_step == 8
    assert model.weight == expected.weight
    kept = ["run/step=4.ckpt"] if wanted == "best" else []  # what a run resumed from is not removed
    assert names(url) == ["run/last.ckpt", *kept, "run/step=7.ckpt", "run/step=8.ckpt"]


def test_evaluation_takes_the_best(Evaluated: Any, make: Make, numbers: Make, url: str) -> None:
    trainer = make(ModelCheckpoint(url, "{step}", every_n_train_steps=2, save_top_k=1))
    trainer.fit(Evaluated(), numbers(4), numbers(2))
    trainer.test(Evaluated(), numbers(4), ckpt_path="best", verbose=False)
    assert trainer.ckpt_path == f"{url}/step=4.ckpt"


def test_checkpoint_that_was_cut_off_is_named_and_the_one_before_it_is_taken(Weight: Any, make: Make, numbers: Make, url: str) -> None:
    make(ModelCheckpoint(url, "{step}", every_n_train_steps=1, save_top_k=-1)).fit(Weight(), numbers(3))
    filesystem = fsspec.core.url_to_fs(url)[0]
    whole = filesystem.cat_file(f"{url}/step=3.ckpt")
    filesystem.pipe_file(f"{url}/step=3.ckpt", whole[:-100])
    with pytest.warns(UserWarning, match=r"step=3\.ckpt"):
        path = newest_valid(url)
    assert path.endswith("/step=2.ckpt")
    found = generation_of(path)
    assert found is not None
    assert found.global_step == 2


def test_state_of_an_exception_is_saved_resumed_from_and_removed(Weight: Any, make: Make, numbers: Make, url: str) -> None:
    with pytest.raises(ZeroDivisionError):
        make(OnExceptionCheckpoint(f"{url}/failed"), Crash()).fit(Weight(), numbers(8))
    assert names(url) == ["failed/on_exception.ckpt"]
    model, expected = Weight(), Weight()
    make(OnExceptionCheckpoint(f"{url}/failed")).fit(model, numbers(8), ckpt_path="last")
    make(enable_checkpointing=False).fit(expected, numbers(8))
    assert model.weight == expected.weight
    assert names(url) == []


def test_same_command_goes_on_from_the_newest_whole_checkpoint(Weight: Any, make: Make, numbers: Make, url: str) -> None:
    def fit(*callbacks: Callback) -> Any:
        model = Weight()
        make(ModelCheckpoint(url, "{step}", every_n_train_steps=1), *callbacks).fit(model, numbers(8), ckpt_path="auto")
        return model

    with pytest.raises(ZeroDivisionError):
        fit(Crash())
    assert names(url) == ["step=5.ckpt"]
    model = fit()
    assert len(model.seen) == 3
    assert model.weight == -sum(range(8))
    assert names(url) == ["step=5.ckpt", "step=8.ckpt"]  # what a run resumed from is not removed


def test_default_folder_may_be_remote(Weight: Any, make: Make, numbers: Make, url: str) -> None:
    trainer = make(default_root_dir=url)
    trainer.fit(Weight(), numbers(2))
    assert names(url) == ["checkpoints/epoch=0-step=2.ckpt"]
    trainer.save_checkpoint(f"{url}/own.ckpt")
    assert torch.equal(load(f"{url}/own.ckpt")["state_dict"]["weight"], torch.tensor(-1.0))


def test_upload_that_fails_leaves_nothing_and_keeps_what_was_there(
    Weight: Any, make: Make, numbers: Make, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(enable_checkpointing=False)
    trainer.fit(Weight(), numbers(2))
    trainer.save_checkpoint(f"{url}/own.ckpt")
    before = fsspec.core.url_to_fs(url)[0].cat_file(f"{url}/own.ckpt")

    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "the line is cut")

    monkeypatch.setattr(seal.Sealing, "seal", fail)
    with pytest.raises(OSError, match="the line is cut"):
        trainer.save_checkpoint(f"{url}/own.ckpt")
    assert names(url) == ["own.ckpt"]
    assert fsspec.core.url_to_fs(url)[0].cat_file(f"{url}/own.ckpt") == before
