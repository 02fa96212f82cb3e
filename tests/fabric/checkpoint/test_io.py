"""Files: whole or not there, on disk, on remote storage, from the web."""

from __future__ import annotations

import errno
import functools
import http.server
import io
import os
import pickle
import resource
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning.fabric.checkpoint import io as checkpoint_io
from lightning.fabric.checkpoint.format import Opaque
from lightning.fabric.checkpoint.io import CheckpointIO, TorchCheckpointIO, load, save

CHECKPOINT = {"state_dict": {"w": torch.arange(3.0)}, "hyper_parameters": {"path": Path("x")}, "epoch": 1}


class Foreign:
    pass


def same(loaded: Any) -> bool:
    return (
        torch.equal(loaded["state_dict"]["w"], torch.arange(3.0))
        and loaded["hyper_parameters"] == {"path": Path("x")}
        and loaded["epoch"] == 1
    )


@pytest.mark.parametrize("target", ["a.ckpt", "deep/er/a.ckpt", Path("b.ckpt"), "file://{cwd}/c.ckpt", "memory://bucket/deep/a.ckpt"])
def test_default_load_reads_what_a_default_save_writes(target: Any) -> None:
    if isinstance(target, str):
        target = target.format(cwd=Path.cwd())
    save(CHECKPOINT, target)
    assert same(load(target))


def test_save_replaces_the_file_and_leaves_nothing_else() -> None:
    save({"epoch": 1}, "a.ckpt")
    save({"epoch": 2}, "a.ckpt")
    assert load("a.ckpt") == {"epoch": 2}
    assert os.listdir() == ["a.ckpt"]


def test_equal_checkpoints_are_equal_files() -> None:
    save(CHECKPOINT, "a.ckpt")
    save(CHECKPOINT, "b.ckpt")
    assert Path("a.ckpt").read_bytes() == Path("b.ckpt").read_bytes()


def test_permissions_follow_the_umask() -> None:
    before = os.umask(0o027)
    try:
        save({}, "a.ckpt")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("a.ckpt").st_mode) == 0o640


def test_save_through_a_link_replaces_the_link_and_keeps_what_it_pointed_to() -> None:
    save({"epoch": 1}, "first.ckpt")
    os.symlink("first.ckpt", "last.ckpt")
    save({"epoch": 2}, "last.ckpt")
    assert load("first.ckpt") == {"epoch": 1}
    assert load("last.ckpt") == {"epoch": 2}


@pytest.mark.parametrize("target", ["a.ckpt", "memory://failing/a.ckpt"])
def test_value_that_can_not_be_stored_leaves_the_old_file(target: str) -> None:
    save({"epoch": 1}, target)
    with pytest.raises(TypeError, match=r"hyper_parameters\.f"):
        save({"epoch": 2, "hyper_parameters": {"f": lambda: 1}}, target)
    assert load(target) == {"epoch": 1}
    assert not list(Path().glob(".*"))


def test_full_disk_raises_and_leaves_the_old_file() -> None:
    save({"epoch": 1}, "a.ckpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match=r"a\.ckpt") as info:
            save({"w": torch.zeros(1_000_000)}, "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert info.value.errno == errno.EFBIG
    assert load("a.ckpt") == {"epoch": 1}
    assert os.listdir() == ["a.ckpt"]


class Interrupting(dict[str, Any]):
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise KeyboardInterrupt


def test_interrupt_while_saving_leaves_the_old_file() -> None:
    save({"epoch": 1}, "a.ckpt")
    with torch.serialization.safe_globals([Interrupting]), pytest.raises(KeyboardInterrupt):
        save({"w": torch.ones(3), "x": Interrupting()}, "a.ckpt")
    assert os.listdir() == ["a.ckpt"]


def test_failed_upload_leaves_the_old_file_and_no_rubbish() -> None:
    import fsspec

    filesystem = fsspec.filesystem("memory")
    save({"epoch": 1}, "memory://failed/a.ckpt")
    with torch.serialization.safe_globals([Interrupting]), pytest.raises(KeyboardInterrupt):
        save({"w": torch.ones(3), "x": Interrupting()}, "memory://failed/a.ckpt")
    assert filesystem.ls("/failed", detail=False) == ["/failed/a.ckpt"]
    assert load("memory://failed/a.ckpt") == {"epoch": 1}


def test_save_to_the_place_of_a_directory_is_refused() -> None:
    os.mkdir("a.ckpt")
    with pytest.raises(IsADirectoryError, match=r"a\.ckpt"):
        save({}, "a.ckpt")
    assert os.listdir("a.ckpt") == []
    with pytest.raises(IsADirectoryError, match="no checkpoint"):
        load("a.ckpt")


def test_storage_options_reach_the_file_system_and_are_refused_for_local_paths() -> None:
    with pytest.raises(TypeError, match="storage_options"):
        save({}, "a.ckpt", storage_options={"key": 1})
    save({}, "memory://with/options.ckpt", storage_options={"skip_instance_cache": True})
    assert load("memory://with/options.ckpt") == {}


@pytest.mark.parametrize("path", ["nope.ckpt", "no/folder/nope.ckpt", "memory://nope/nope.ckpt"])
def test_missing_file_is_named(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"Checkpoint file not found.*{path}"):
        load(path)


def test_load_takes_open_files() -> None:
    save(CHECKPOINT, "a.ckpt")
    with open("a.ckpt", "rb") as file:
        assert same(load(file))
    assert same(load(io.BytesIO(Path("a.ckpt").read_bytes())))


@pytest.mark.parametrize("kept", [0, 10, 100, 1000, -1])
def test_torn_file_is_called_damaged(kept: int) -> None:
    save({"w": torch.ones(2000)}, "whole.ckpt")
    Path("torn.ckpt").write_bytes(Path("whole.ckpt").read_bytes()[:kept])
    with pytest.raises(RuntimeError, match=r"'torn\.ckpt'.*damaged"):
        load("torn.ckpt")


@pytest.mark.parametrize(
    "content", [b"hello world", b"<html>404</html>", b"\x80\x02.", b"\x00" * 50, b"PK\x03\x04" + b"x" * 100, b"\x80\x05K"]
)
def test_file_of_another_kind_is_called_damaged(content: bytes) -> None:
    Path("other.ckpt").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"'other\.ckpt'.*damaged"):
        load("other.ckpt")


def test_refused_class_is_named_with_the_way_out() -> None:
    torch.save({"x": Foreign()}, "a.ckpt")
    with pytest.raises(pickle.UnpicklingError, match=r"'a\.ckpt' holds \S*Foreign that can't be read safely.*weights_only=False"):
        load("a.ckpt")
    assert isinstance(load("a.ckpt", weights_only=False)["x"], Foreign)


def test_opaque_value_needs_trust() -> None:
    save({"x": Foreign()}, "a.ckpt")
    for weights_only in (None, True):
        assert isinstance(load("a.ckpt", weights_only=weights_only)["x"], Opaque)
    assert isinstance(load("a.ckpt", weights_only=False)["x"], Foreign)


def test_paths_namespaces_and_dates_pickled_by_others_are_read_and_nothing_stays_allowed() -> None:
    import argparse
    import datetime

    value = {
        "p": Path("x"),
        "ns": argparse.Namespace(a=Path("y")),
        "d": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        "t": datetime.timedelta(1),
    }
    torch.save(value, "a.ckpt")
    before = set(torch.serialization.get_safe_globals())  # torch lists a set, in no order
    assert load("a.ckpt") == value
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load("a.ckpt", weights_only=True)


def test_what_the_user_has_allowed_stays_allowed() -> None:
    entry = checkpoint_io._harmless()[0]
    with torch.serialization.safe_globals([entry]):
        save({}, "a.ckpt")
        load("a.ckpt")
        assert entry in torch.serialization.get_safe_globals()


def test_loads_in_many_threads_do_not_disturb_each_other() -> None:
    torch.save({"p": Path("x"), "w": torch.ones(1000)}, "a.ckpt")
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(20):
                load("a.ckpt")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_map_location_reaches_tensors_of_opaque_values_too() -> None:
    seen: list[str] = []

    def locate(storage: Any, location: str) -> Any:
        seen.append(location)
        return storage

    save({"net": torch.nn.Linear(1, 1)}, "a.ckpt")
    assert isinstance(load("a.ckpt", map_location=locate, weights_only=False)["net"], torch.nn.Linear)
    assert seen == ["cpu", "cpu", "cpu"]  # the bytes, the weight and the bias


def test_map_location_meta_gives_the_shapes_and_says_what_is_lost() -> None:
    save({"w": torch.ones(2), "a": np.ones(2), "g": torch.Generator(), "net": torch.nn.Linear(1, 1)}, "a.ckpt")
    with pytest.warns(UserWarning, match="another map_location"):
        loaded = load("a.ckpt", map_location="meta", weights_only=False)
    assert loaded["w"].is_meta
    assert [type(loaded[key]).__name__ for key in ("a", "g", "net")] == ["Unresolved", "Unresolved", "Opaque"]


# --- the web --------------------------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path, list[str]]]:
    """A server, the folder it serves, and the requests it got."""
    folder = tmp_path / "served"
    folder.mkdir()
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            requests.append(self.path)

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder, requests
        server.shutdown()


def test_url_is_downloaded_once_and_told_apart_from_others_of_the_same_name(web: tuple[str, Path, list[str]]) -> None:
    url, folder, requests = web
    for name in ("a", "b"):
        save({"name": name}, folder / name / "model.ckpt")
    assert load(f"{url}/a/model.ckpt") == {"name": "a"}
    assert load(f"{url}/b/model.ckpt") == {"name": "b"}
    assert load(f"{url}/a/model.ckpt?version=2") == {"name": "a"}
    assert load(f"{url}/a/model.ckpt") == {"name": "a"}
    assert len(requests) == 3


def test_url_of_nothing_is_a_missing_file(web: tuple[str, Path, list[str]]) -> None:
    url, _, _ = web
    with pytest.raises(FileNotFoundError, match=r"nope\.ckpt"):
        load(f"{url}/nope.ckpt")


def test_damaged_download_is_not_kept(web: tuple[str, Path, list[str]]) -> None:
    url, folder, _ = web
    (folder / "model.ckpt").write_bytes(b"half a file")
    with pytest.raises(RuntimeError, match="damaged"):
        load(f"{url}/model.ckpt")
    save({"epoch": 1}, folder / "model.ckpt")
    assert load(f"{url}/model.ckpt") == {"epoch": 1}


@pytest.mark.parametrize("old_format", [False, True])
def test_download_that_has_changed_on_the_disk_is_fetched_again(old_format: bool, web: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    url, folder, requests = web
    torch.save({"epoch": 1}, folder / "model.ckpt", _use_new_zipfile_serialization=not old_format)
    load(f"{url}/model.ckpt")
    (cached,) = [path for path in tmp_path.glob("hub/checkpoints/*") if path.suffix == ".ckpt"]
    torch.save({"epoch": 2}, cached, _use_new_zipfile_serialization=not old_format)
    assert load(f"{url}/model.ckpt") == {"epoch": 1}
    assert load(f"{url}/model.ckpt") == {"epoch": 1}
    assert len(requests) == 2


def test_half_a_download_of_the_old_format_is_not_kept(web: tuple[str, Path, list[str]]) -> None:
    url, folder, _ = web
    torch.save({"w": torch.ones(1000)}, folder / "whole.ckpt", _use_new_zipfile_serialization=False)
    (folder / "model.ckpt").write_bytes((folder / "whole.ckpt").read_bytes()[:-500])
    with pytest.raises(RuntimeError, match=r"model\.ckpt"):
        load(f"{url}/model.ckpt")
    (folder / "model.ckpt").write_bytes((folder / "whole.ckpt").read_bytes())
    assert torch.equal(load(f"{url}/model.ckpt")["w"], torch.ones(1000))


# --- the plugin -----------------------------------------------------------------------------------------------------


def test_plugin_saves_loads_and_removes() -> None:
    plugin = TorchCheckpointIO()
    for path in ("a.ckpt", "memory://plugin/a.ckpt"):
        plugin.save_checkpoint(CHECKPOINT, path)
        assert same(plugin.load_checkpoint(path))
        plugin.remove_checkpoint(path)
        with pytest.raises(FileNotFoundError):
            plugin.load_checkpoint(path)
        plugin.remove_checkpoint(path)
    assert os.listdir() == []


def test_plugin_removes_folders_but_not_what_a_link_points_to() -> None:
    save({}, "folder/part.ckpt")
    save({}, "kept/part.ckpt")
    os.symlink("kept", "link")
    plugin = TorchCheckpointIO()
    plugin.remove_checkpoint("folder")
    plugin.remove_checkpoint("link")
    assert os.listdir() == ["kept"]
    assert os.listdir("kept") == ["part.ckpt"]


def test_interface_is_abstract_and_importable_where_it_is_documented() -> None:
    from lightning.fabric.plugins.io import CheckpointIO as documented
    from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO as in_module
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO as torch_io

    assert documented is in_module is CheckpointIO
    assert torch_io is TorchCheckpointIO
    with pytest.raises(TypeError, match="abstract"):
        CheckpointIO()  # type: ignore[abstract]
    TorchCheckpointIO().teardown()
