"""OmegaConf containers come back, and functions they call through interpolations do not."""

from __future__ import annotations

import enum
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning.fabric.checkpoint.format import TAG, Unresolved, decode, encode
from lightning.fabric.checkpoint.omega import calls_resolver

calls: list[str] = []


class Mode(enum.Enum):
    MIN = 1


@pytest.fixture(autouse=True)
def resolver() -> Iterator[None]:
    calls.clear()

    def spy(value: Any) -> str:
        calls.append(value)
        return f"<{value}>"

    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)  # the second is the name before 2.4
    register("spy", spy)
    yield
    OmegaConf.clear_resolver("spy")


def through_file(obj: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(encode(obj), buffer)
    buffer.seek(0)
    return decode(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("content", [{"a": 1, "b": {"c": [1, "x", None]}, "m": Mode.MIN, "p": Path("x"), 3: "???"}, [1, {"a": 2}], {}, []])
def test_container_comes_back_equal(content: Any) -> None:
    config = OmegaConf.create(content)
    result = through_file({"cfg": config})["cfg"]
    assert type(result) in (DictConfig, ListConfig)
    assert result == config


def test_interpolation_between_values_stays_one() -> None:
    result = through_file(OmegaConf.create({"width": 3, "twice": "${width}${.width}", "text": "\\${width}"}))
    result.width = 4
    assert (result.twice, result.text) == ("44", "${width}")


def test_flags_come_back() -> None:
    config = OmegaConf.create({"a": 1})
    OmegaConf.set_readonly(config, True)
    OmegaConf.set_struct(config, True)
    result = through_file(config)
    assert OmegaConf.is_readonly(result)
    assert OmegaConf.is_struct(result)


def test_resolver_is_replaced_by_the_value_it_had() -> None:
    config = OmegaConf.create({"a": "${spy:1}", "b": {"c": "${a}!"}, "plain": "\\${x:y}"})
    encoded = encode(config)
    calls.clear()
    result = decode(encoded)
    assert (result.a, result.b.c, result.plain) == ("<1>", "<1>!", "${x:y}")
    assert calls == []


@pytest.mark.parametrize(
    "text",
    ["${spy:1}", "a${spy:1}b", "\\\\${spy:1}", "${${name}:1}", "${spy:${name}}", "${ spy : 1}", "${name}${spy:'}'}", "${sub.${spy:k}}"],
)
@pytest.mark.parametrize("resolved", [False, True])
def test_file_can_not_smuggle_a_resolver_call(text: str, resolved: bool) -> None:
    content = {"name": "spy", "sub": {"k": 1}, "x": [{"y": text}]}
    harmless = {"a": "${spy:1}"} if resolved else content
    written = {
        TAG: "omegaconf",
        "readonly": False,
        "struct": False,
        "value": {"content": harmless, "resolved": content if resolved else None},
    }
    result = decode(written)
    OmegaConf.to_container(result, resolve=True)
    assert calls == []


def test_resolver_call_in_a_file_reads_as_text() -> None:
    written = {TAG: "omegaconf", "readonly": False, "struct": False, "value": {"content": {"a": "x${spy:1}"}, "resolved": None}}
    assert decode(written).a == "x${spy:1}"


def test_only_plain_values_become_part_of_a_container() -> None:
    inner = {TAG: "argparse.Namespace", "value": {"a": 1}}
    written = {TAG: "omegaconf", "readonly": False, "struct": False, "value": {"content": {"a": inner}, "resolved": None}}
    with pytest.raises(ValueError, match="Namespace in an OmegaConf container"):
        decode(written)


def test_failing_resolver_does_not_keep_the_checkpoint_from_being_saved() -> None:
    assert through_file(OmegaConf.create({"a": "${no_such_resolver:1}", "b": 2})).b == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${a.b}", False),
        ("${h}:${p}", False),
        ("http://x", False),
        ("${oc.env:X}", True),
        ("${a${b}:1}", True),
        ("{a: 1}", False),
        ("${a}}:", False),
    ],
)
def test_calls_of_resolvers_are_told_from_references(text: str, expected: bool) -> None:
    assert calls_resolver(text) is expected


def test_data_comes_back_where_omegaconf_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode(OmegaConf.create({"a": 1}))
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with pytest.warns(UserWarning, match="install omegaconf"):
        result = decode(encoded)
    assert isinstance(result, Unresolved)
    assert result["content"] == {"a": 1}


def test_saving_imports_no_omegaconf() -> None:
    code = "import sys; from lightning.fabric.checkpoint.format import encode; encode({'a': [print]}); print('omegaconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
