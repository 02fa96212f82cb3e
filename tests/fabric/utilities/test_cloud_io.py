"""Paths and files on local and remote storage."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from lightning.fabric.utilities.cloud_io import get_filesystem, is_local, join_path, local_path, replacing


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    url = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").makedirs(url, exist_ok=True)
    return url


def test_get_filesystem_takes_paths_urls_and_storage_options(tmp_path: Path) -> None:
    assert get_filesystem(tmp_path).protocol == ("file", "local")
    assert get_filesystem("relative/path").protocol == ("file", "local")
    assert get_filesystem("memory://x").protocol == "memory"
    assert get_filesystem(tmp_path, auto_mkdir=True).auto_mkdir


def test_get_filesystem_names_the_missing_package() -> None:
    with pytest.raises(ImportError, match="dropbox"):
        get_filesystem("dropbox://folder")


@pytest.mark.parametrize(
    ("path", "local"),
    [("a/b", "a/b"), ("/a", "/a"), ("", ""), ("file:///a/b", "/a/b"), ("s3://b/a", None), ("memory://a", None), (Path("a"), "a")],
)
def test_local_path_is_none_for_remote_urls_only(path: str | Path, local: str | None) -> None:
    assert local_path(path) == local
    assert is_local(path) == (local is not None)


def test_local_path_leads_home_from_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/a") == "/home/me/a"
    assert local_path("a/~") == "a/~"
    assert local_path("s3://~/a") is None


def test_join_path_keeps_url_separators() -> None:
    assert join_path("a", "b", "c") == os.path.join("a", "b", "c")
    assert join_path(Path("a"), "b") == os.path.join("a", "b")
    assert join_path("s3://bucket/", "b", "c.csv") == "s3://bucket/b/c.csv"
    assert join_path("memory://", "b") == "memory://b"


def test_replacing_takes_the_place_of_the_old_content(folder: str) -> None:
    path = join_path(folder, "file.txt")
    for text in ("first", "second: ä"):
        with replacing(path) as file:
            file.write(text)
    with get_filesystem(path).open(path, "rb") as stored:
        assert stored.read().decode() == "second: ä"
    assert [os.path.basename(name) for name in get_filesystem(folder).ls(folder, detail=False)] == ["file.txt"]


def test_replacing_keeps_the_old_content_after_an_error(folder: str) -> None:
    path = join_path(folder, "file.txt")
    with replacing(path) as file:
        file.write("old")

    def write_half() -> None:
        with replacing(path) as file:
            file.write("half of the n")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_half()
    with get_filesystem(path).open(path, "r") as stored:
        assert stored.read() == "old"
    assert [os.path.basename(name) for name in get_filesystem(folder).ls(folder, detail=False)] == ["file.txt"]
