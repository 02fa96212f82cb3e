"""Where things are: devices chosen, batches moved, metrics kept, modules and checkpoints brought back."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .common import Batches, Check, Classifier, Place, Skip, batches, run_python, seeded

REPOSITORY = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def checks(place: Place) -> list[Check]:
    return [
        ("accelerator is chosen", lambda: chooses(place)),
        ("devices in all forms", lambda: forms(place)),
        ("a second GPU by its index", lambda: second_gpu(place)),
        ("wrong devices: errors name what is there", lambda: wrong_devices(place)),
        ("a CPU run makes no CUDA context", lambda: no_context(place)),
        ("module, buffers and new tensors are on the device, and back on the CPU after it", lambda: placement(place)),
        ("batches of nested structures move", lambda: nested(place)),
        ("metrics stay on the device", lambda: metrics_stay(place)),
        ("predict returns CPU tensors", lambda: predicts(place)),
        ("a checkpoint of this device, on a machine without it and back", lambda: checkpoint_travels(place)),
        *((f"examples/digits.py, {p}", lambda p=p: digits_example(place, p)) for p in ("16-mixed", "bf16-mixed")),
    ]


def chooses(place: Place) -> str:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("auto", "gpu", "cuda") if place.is_cuda else ("auto",):
        trainer = L.Trainer(accelerator=name, devices=1, logger=False, enable_checkpointing=False)
        assert trainer.accelerator.name() == expected, name
        assert trainer.strategy.root_device == torch.device(expected, 0 if expected == "cuda" else None), trainer.strategy.root_device
        assert trainer.num_devices == 1
    L.Trainer(accelerator="cpu", devices=1, logger=False)
    return str(trainer.strategy.root_device)


def forms(place: Place) -> str:
    name, given = place.device.type, [1, "1"]
    if place.is_cuda:
        given += [[0], "0,", *(["auto", -1, "-1"] if torch.cuda.device_count() == 1 else [])]
    for devices in given:
        trainer = L.Trainer(accelerator=name, devices=devices, logger=False)
        assert trainer.strategy.root_device.type == name
        assert trainer.strategy.root_device.index in (None, 0)
        assert trainer.device_ids == [0], (devices, trainer.device_ids)
    return ", ".join(map(repr, given))


def second_gpu(place: Place) -> None:
    if torch.cuda.device_count() < 2:
        raise Skip("needs two GPUs")
    for devices in ([1], "1,"):
        model, seen = seeded(), set()
        model.register_forward_pre_hook(lambda module, inputs: seen.update({inputs[0].device, module.device}))  # noqa: B023
        L.Trainer(accelerator="cuda", devices=devices, max_epochs=1, logger=False, enable_checkpointing=False).fit(model, batches(2))
        assert seen == {torch.device("cuda", 1)}, seen
    torch.cuda.set_device(place.device)


def refusal(error: type[Exception], **arguments: Any) -> str:
    try:
        L.Trainer(logger=False, **arguments)
    except error as refused:
        return str(refused)
    raise AssertionError(f"Trainer({arguments}) was accepted")


def wrong_devices(place: Place) -> str:
    if not place.is_cuda:
        if torch.cuda.is_available():
            raise Skip("this machine has a GPU")
        for name in ("gpu", "cuda"):
            message = refusal(MisconfigurationException, accelerator=name)
            assert "cpu" in message
            assert name in message
        return message
    count = torch.cuda.device_count()
    there = str(list(range(count)))
    for devices in ([count], f"{count},", [0, count + 3], count + 1, str(count + 1)):
        message = refusal(MisconfigurationException, accelerator="cuda", devices=devices)
        assert there in message, message
        assert repr(devices) in message, message
    for devices in (0, "0", [], [0, 0]):
        refusal(MisconfigurationException, accelerator="cuda", devices=devices)
    refusal(ValueError, accelerator="cuda", devices="first")
    refusal(TypeError, accelerator="cuda", devices=1.5)
    return message


NO_CONTEXT = """
import sys
sys.path[:0] = {paths!r}
import torch
from trainer_checks.common import Place, batches, seeded
place = Place(torch.device("cpu"))
model = seeded(log=dict(on_step=True, on_epoch=True, prog_bar=True))
trainer = place.trainer("bf16-mixed", max_epochs=1, enable_checkpointing=True, default_root_dir={folder!r})
trainer.fit(model, batches(3), batches(2))
trainer.predict(model, batches(2))
print("context:", torch.cuda.is_initialized(), "GPUs:", torch.cuda.device_count())
"""


def own_paths() -> list[str]:
    return [str(REPOSITORY / "src"), str(REPOSITORY / "tests" / "gpu")]


def no_context(place: Place) -> str:
    with tempfile.TemporaryDirectory() as folder:
        answer = run_python(["-c", NO_CONTEXT.format(paths=own_paths(), folder=folder)]).strip().splitlines()[-1]
    assert answer.startswith("context: False"), answer
    return answer


class Placed(Classifier):
    """A model with a buffer that notes where its parts are."""

    def __init__(self) -> None:
        super().__init__("conv")
        self.register_buffer("counter", torch.zeros(1))
        self.where: list[Any] = []

    def note(self, batch: Any) -> None:
        tensors = [*self.parameters(), *self.buffers(), *batch]
        self.where.append({self.device, *(tensor.device for tensor in tensors)})
        self.counter += 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note(batch)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = self.optimizers().state
        self.where.append({outputs["loss"].device, *(v.device for s in state.values() for k, v in s.items() if k != "step")})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note(batch)
        super().validation_step(batch, batch_idx)


def placement(place: Place) -> str:
    torch.manual_seed(0)
    model = Placed()
    trainer = place.trainer()
    with trainer.init_module():
        assert torch.zeros(1).device == place.device
        assert nn.Linear(2, 2).weight.device == place.device
    assert torch.zeros(1).device == CPU
    trainer.fit(model, batches(3), batches(2))
    assert all(where == {place.device} for where in model.where), model.where
    assert len(model.where) == 3 + 3 + 2 + 2, "two training hooks, two validation batches, two of the sanity check"
    after = {tensor.device for tensor in [*model.parameters(), *model.buffers()]} | {model.device}
    after |= {v.device for s in trainer.optimizers[0].state.values() for v in s.values()}
    assert after == {CPU}, after
    trainer.validate(model, batches(1), verbose=False)
    assert model.where[-1] == {place.device}
    assert model.device == CPU
    if not place.is_cuda:
        return "on the CPU"
    gc.collect()
    held = torch.cuda.memory_allocated()
    place.trainer().fit(Placed(), batches(3), batches(2))
    gc.collect()  # trainer and loops refer to each other
    again = torch.cuda.memory_allocated()
    assert again <= held, f"{held} bytes of the GPU were taken after one run, {again} after another"
    return f"{held / 2**20:.1f} MiB of the GPU are taken after it, as after a second run: workspaces of cuBLAS"


Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Record:
    x: Tensor
    label: str = "text"


class Movable:
    """Something with a ``to`` of its own."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> Movable:
        return Movable(self.x.to(device))


def nested(place: Place) -> str:
    x = torch.randn(6, 1, 8, 8)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    batch = {
        "x": x, "list": [x, [x]], "tuple": (x, 1, None), "pair": Pair(x, "text"), "record": Record(x), "own": Movable(x),
        "packed": packed, "text": "text", "number": 3, "sparse": torch.eye(3).to_sparse(), "half": x.half(), "long": torch.arange(3),
    }  # fmt: skip
    seen: list[Any] = []

    class Looks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch)
            return self(batch["x"]).square().mean()

    torch.manual_seed(0)
    place.trainer().fit(Looks(), Batches([batch]))
    got = seen[0]
    tensors = [got["x"], got["list"][0], got["list"][1][0], got["tuple"][0], got["pair"].x, got["record"].x, got["own"].x]
    tensors += [got["packed"].data, got["sparse"], got["half"], got["long"]]
    assert {tensor.device for tensor in tensors} == {place.device}
    assert {key: type(value) for key, value in got.items()} == {key: type(value) for key, value in batch.items()}
    assert (got["tuple"][1:], got["pair"].y, got["record"].label, got["text"], got["number"]) == ((1, None), "text", "text", "text", 3)
    assert got["half"].dtype is torch.float16
    assert x.device == CPU, "the loader's own batch stays as it was"
    return f"{len(tensors)} tensors in {len(batch)} structures"


def metrics_stay(place: Place) -> str:
    found: dict[str, set[Any]] = {}

    class Watch(L.Callback):
        def look(self, hook: str, trainer: L.Trainer) -> None:
            for values in (trainer.callback_metrics, trainer.logged_metrics):
                found.setdefault(hook, set()).update((name, value.device) for name, value in values.items())
            assert all(type(value) is float for value in trainer.progress_bar_metrics.values())

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.look("batch", trainer)

        def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.look("validation", trainer)

        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.look("epoch", trainer)

    model = seeded(log={"on_step": True, "on_epoch": True, "prog_bar": True})
    trainer = place.trainer("bf16-mixed", callbacks=[Watch()], num_sanity_val_steps=0)
    trainer.fit(model, batches(4), batches(2))
    training, validation = {"loss", "loss_step"}, {"val_loss", "val_acc"}
    expected = {"batch": training, "validation": training | validation, "epoch": training | validation | {"loss_epoch"}}
    assert {hook: {name for name, _ in pairs} for hook, pairs in found.items()} == expected, found
    assert {device for pairs in found.values() for _, device in pairs} == {place.device}
    mean = torch.stack(model.losses).double().mean().item()
    assert abs(trainer.callback_metrics["loss_epoch"].item() - mean) < 1e-5
    assert abs(trainer.progress_bar_metrics["loss_epoch"] - mean) < 1e-5
    return f"after fit: {trainer.callback_metrics['loss_epoch'].device}"


def predicts(place: Place) -> str:
    model, data = seeded(), batches(3)
    found = place.trainer("bf16-mixed").predict(model, data)
    assert len(found) == 3
    for index, output in enumerate(found):
        assert output["logits"].device == output["nested"][0].device == CPU
        assert output["logits"].shape == (32, 10)
        assert output["logits"].dtype is torch.bfloat16
        assert output["nested"][1] == "text"
        assert output["index"] == index
        assert torch.equal(output["nested"][0], data[index][1])
    [full, *_] = place.trainer().predict(model, data)
    with torch.no_grad():
        assert torch.allclose(full["logits"], model.eval()(data[0][0]), atol=1e-2)
    return "3 batches"


WITHOUT_GPU = """
import sys
sys.path[:0] = {paths!r}
import torch
from trainer_checks.common import Classifier, Place, batches, seeded
assert not torch.cuda.is_available()
loaded = Classifier.load_from_checkpoint({path!r})
assert loaded.device == torch.device("cpu") and loaded.hparams.net == "conv"
place = Place(torch.device("cpu"))
trainer = place.trainer(max_epochs=2)
model = Classifier("conv", schedule=True)
trainer.fit(model, batches(4), ckpt_path={path!r})
assert trainer.global_step == 8 and trainer.current_epoch == 2, trainer.global_step
trainer.save_checkpoint({back!r})
[result] = trainer.validate(loaded, batches(2), verbose=False)
print("loss:", result["val_loss"])
"""


def checkpoint_travels(place: Place) -> str:
    """Saved here, continued by a process that sees no GPU, continued here again."""
    data = batches(4)
    with tempfile.TemporaryDirectory() as folder:
        back = str(Path(folder, "back.ckpt"))
        saver = ModelCheckpoint(folder, filename="here")
        model = seeded("conv", schedule=True)
        trainer = place.trainer("16-mixed", enable_checkpointing=True, callbacks=[saver])
        trainer.fit(model, data)
        path = saver.best_model_path
        [here] = place.trainer().validate(model, batches(2), verbose=False)
        code = WITHOUT_GPU.format(paths=own_paths(), path=path, back=back)
        there = float(run_python(["-c", code], CUDA_VISIBLE_DEVICES="").split("loss:")[1])
        assert abs(here["val_loss"] - there) < 1e-2 * abs(there), (here, there)
        loaded = Classifier.load_from_checkpoint(path, map_location=place.device)
        assert loaded.device == place.device
        model = Classifier("conv", schedule=True)
        last = place.trainer("16-mixed", max_epochs=3)
        last.fit(model, data, ckpt_path=back)
        assert last.global_step == 12
        assert len(model.losses) == 4
        assert {loss.device for loss in model.losses} == {place.device}
    return f"validation loss {here['val_loss']:.5f} here, {there:.5f} there"


def digits_example(place: Place, precision: str) -> str:
    script = REPOSITORY / "examples" / "digits.py"
    if not script.exists():
        raise Skip("there is no examples/digits.py")
    with tempfile.TemporaryDirectory() as folder:
        # The trainer says which precision the CPU really takes; a GPU takes what is asked for.
        arguments = ["--accelerator", place.device.type, "--precision", precision, "--output", folder]
        printed = run_python([str(script), *arguments], PYTHONPATH=paths_for_child(), PYTHONUNBUFFERED="1")
        accuracy = float(re.search(r"Test accuracy: ([0-9.]+)", printed)[1])  # type: ignore[index]
        picture = Path(re.search(r"Picture: (.+)", printed)[1].strip())  # type: ignore[index]
        assert picture.stat().st_size > 10_000
    assert accuracy >= 0.98, accuracy
    return f"accuracy {accuracy:.4f}"


def paths_for_child() -> str:
    return os.pathsep.join([str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
