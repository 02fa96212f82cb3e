"""Training learns, and computes bit for bit what a hand-written loop computes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from .common import Check, Classifier, Place, Skip, assert_equal, batches, by_hand, clipping, conv, deterministic, seeded

PRECISIONS = {
    "32-true": torch.float32, "16-mixed": torch.float32, "bf16-mixed": torch.float32,
    "16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64,
}  # fmt: skip

# what: (network, fused optimizer, clipping, batches to accumulate)
CASES: dict[str, tuple[str, bool, tuple[str, float] | None, int]] = {
    "mlp": ("mlp", False, None, 1),
    "conv, fused": ("conv", True, None, 1),
    "norm clipped": ("conv", False, ("norm", 0.05), 1),
    "norm clipped, fused": ("mlp", True, ("norm", 0.05), 1),
    "value clipped, fused": ("conv", True, ("value", 0.001), 1),
    "4 accumulated": ("conv", False, None, 4),
    "4 accumulated, norm clipped, fused": ("mlp", True, ("norm", 0.05), 4),
}


def checks(place: Place) -> list[Check]:
    found: list[Check] = [(f"learns digits, {precision}", lambda p=precision: learns(place, p)) for precision in PRECISIONS]
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        found += [(f"equals a plain loop, {precision}, {case}", lambda p=precision, c=case: equals(place, p, c)) for case in CASES]
    return [
        *found,
        ("scaler backs off and grows as by hand", lambda: scaler_moves(place)),
        ("scaler's state is saved and restored", lambda: scaler_is_restored(place)),
        *((f"two optimizers by hand, {p}", lambda p=p: two_optimizers(place, p)) for p in ("32-true", "bf16-mixed", "16-mixed")),
        *((f"resumed run equals an unbroken one, {p}", lambda p=p: resumes(place, p)) for p in ("32-true", "bf16-mixed", "16-mixed")),
        *((f"resumed anywhere equals an unbroken one, {p}", lambda p=p: resumes_anywhere(place, p)) for p in ("32-true", "16-mixed")),
    ]


def digits() -> tuple[Any, Any]:
    """Loaders of training and validation data; real pictures."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Skip("needs scikit-learn") from None
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    parts = torch.utils.data.random_split(
        torch.utils.data.TensorDataset(images, torch.tensor(data.target)), [1500, 297], torch.Generator().manual_seed(0)
    )
    return torch.utils.data.DataLoader(parts[0], 50, shuffle=True), torch.utils.data.DataLoader(parts[1], 297)


def learns(place: Place, precision: str) -> str:
    train, val = digits()
    model = seeded("conv", eps=1e-4 if precision == "16-true" else 1e-8)
    seen: set[torch.dtype] = set()
    model.register_forward_pre_hook(lambda module, _: seen.update(p.dtype for p in module.parameters()))
    trainer = place.trainer(precision, max_epochs=6, gradient_clip_val=1.0)
    trainer.fit(model, train)
    [result] = trainer.validate(model, val, verbose=False)
    first, last = (torch.stack(losses).float().mean().item() for losses in (model.losses[:10], model.losses[-10:]))
    assert last < 0.3 * first, f"the loss went from {first:.3f} to {last:.3f}"
    assert result["val_acc"] > 0.93, result
    assert seen == {PRECISIONS[precision]}, seen
    return f"accuracy {result['val_acc']:.3f}, loss {first:.2f} -> {last:.2f}"


def equals(place: Place, precision: str, case: str) -> str:
    """Losses and weights are bit-equal; both in deterministic mode, with the same seed."""
    net, fused, clip, accumulate = CASES[case]
    data = batches(10)
    with deterministic():
        model = seeded(net, fused=fused)
        place.trainer(precision, max_epochs=2, accumulate_grad_batches=accumulate, **clipping(clip)).fit(model, data)
        losses, weights = by_hand(place, seeded(net, fused=fused), data, precision, 2, clip, accumulate)
    assert_equal(model.losses, losses, model.weights(), weights)
    assert losses[-1] < losses[0]
    return f"{len(losses)} losses, last {losses[-1]:.4f}"


class Overflowing(Classifier):
    """A model whose loss is infinite at the third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 2 else loss


def scaler_moves(place: Place) -> str:
    """An overflow leaves its step out and halves the scale; after seven good steps it doubles."""
    torch.manual_seed(0)
    model = Overflowing("mlp")
    scales: list[float] = []
    norms: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            scales.append(trainer.precision_plugin.scaler.get_scale())

        def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
            norms.append(nn.utils.get_total_norm([p.grad for p in module.parameters()]).item())

    trainer = place.trainer(**place.scaled(init_scale=1024.0, growth_interval=7), gradient_clip_val=0.5, callbacks=[Watch()])
    trainer.fit(model, batches(12))
    assert scales == [1024.0] * 2 + [512.0] * 7 + [1024.0] * 3, scales
    finite = [norm for index, norm in enumerate(norms) if index != 2]
    assert all(0 < norm < 100 for norm in finite), f"hooks before the step see true gradients: {norms}"
    assert not torch.isfinite(torch.tensor(norms[2]))
    assert all(torch.isfinite(weight).all() for weight in model.weights())
    return f"norms {min(finite):.2f} to {max(finite):.2f}"


def scaler_is_restored(place: Place) -> str:
    data, states = batches(10), []

    class Watch(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            states.append(trainer.precision_plugin.scaler.state_dict())

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scaled.ckpt")
        first = place.trainer(**place.scaled(init_scale=1024.0, growth_interval=7))
        first.fit(seeded(), data)
        first.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)["MixedPrecision"]
        assert saved["scale"] == 2048.0, saved
        assert saved["_growth_tracker"] == 3, saved
        place.trainer("16-mixed", max_epochs=2, callbacks=[Watch()]).fit(seeded(), data, ckpt_path=path)
    assert states == [saved], (states, saved)
    return f"scale {saved['scale']:.0f}, growth tracker {saved['_growth_tracker']}"


class TwoNets(L.LightningModule):
    """A generator and a critic, each with its own optimizer; the user's training_step does everything."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8)))
        self.critic = conv()
        self.losses: list[Tensor] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True) for net in (self.generator, self.critic)]

    def critic_loss(self, images: Tensor, noise: Tensor) -> Tensor:
        fake = self.generator(noise).detach()
        return nn.functional.softplus(self.critic(fake)).mean() + nn.functional.softplus(-self.critic(images)).mean()

    def generator_loss(self, noise: Tensor) -> Tensor:
        return nn.functional.softplus(-self.critic(self.generator(noise))).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, noise = batch[0], batch[0].flatten(1)[:, :8]
        generator, critic = self.optimizers()
        for optimizer, loss_of in ((critic, lambda: self.critic_loss(images, noise)), (generator, lambda: self.generator_loss(noise))):
            self.toggle_optimizer(optimizer)
            loss = loss_of()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.losses.append(loss.detach())


def two_optimizers(place: Place, precision: str) -> str:
    data = batches(10)
    with deterministic():
        torch.manual_seed(0)
        model = TwoNets()
        trainer = place.trainer(precision, max_epochs=2)
        trainer.fit(model, data)
        torch.manual_seed(0)
        other = TwoNets().to(place.device).train()
        optimizers = other.configure_optimizers()
        scaler = torch.amp.GradScaler(place.device.type, enabled=precision == "16-mixed")
        dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
        for x, _ in [*data, *data]:
            images = x.to(place.device)
            noise = images.flatten(1)[:, :8]
            for which in (1, 0):
                for index, net in enumerate((other.generator, other.critic)):
                    net.requires_grad_(index == which)
                with torch.autocast(place.device.type, dtype=dtype, enabled=dtype is not None):
                    loss = other.critic_loss(images, noise) if which else other.generator_loss(noise)
                optimizers[which].zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizers[which])
                nn.utils.clip_grad_norm_([p for group in optimizers[which].param_groups for p in group["params"]], 0.1)
                scaler.step(optimizers[which])
                scaler.update()
                other.losses.append(loss.detach())
    assert trainer.global_step == 40, trainer.global_step
    weights = [[value.cpu() for value in net.state_dict().values()] for net in (model, other)]
    assert_equal(model.losses, other.losses, *weights)
    return f"{len(model.losses)} losses"


def resumes(place: Place, precision: str) -> str:
    """Two epochs, saved, and two more equal four: weights, moments, schedule, scale."""
    data = batches(10)
    options = {"fused": True, "schedule": True}
    with deterministic(), tempfile.TemporaryDirectory() as folder:
        whole = seeded("conv", **options)
        place.trainer(precision, max_epochs=4, gradient_clip_val=0.1).fit(whole, data)
        saver = ModelCheckpoint(folder, filename="half", save_top_k=1)
        half = place.trainer(precision, max_epochs=2, gradient_clip_val=0.1, enable_checkpointing=True, callbacks=[saver])
        half.fit(seeded("conv", **options), data)
        rest = seeded("conv", **options)
        resumed = place.trainer(precision, max_epochs=4, gradient_clip_val=0.1)
        resumed.fit(rest, data, ckpt_path=saver.best_model_path)
    assert resumed.global_step == 40
    assert len(rest.losses) == 20
    assert_equal(rest.losses, whole.losses[20:], rest.weights(), whole.weights())
    return f"learning rate {resumed.optimizers[0].param_groups[0]['lr']:.2e}"


def resumes_anywhere(place: Place, precision: str) -> str:
    """A run that goes on from the middle of an epoch or of a window: the device's random numbers, shuffled and pinned batches."""

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(f"{folder}/{trainer.fit_loop.progress.total_batches}.ckpt")

    images = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    samples = torch.utils.data.TensorDataset(images, torch.arange(96) % 10)

    def fit(seed: int, **options: Any) -> Classifier:
        model = seeded("conv", dropout=0.5, log={"on_epoch": True})
        trainer = place.trainer(
            precision, max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.1, callbacks=options.get("callbacks")
        )
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(samples, 8, shuffle=True, num_workers=2, persistent_workers=True, pin_memory=place.is_cuda)
        trainer.fit(model, loader, ckpt_path=options.get("ckpt_path"))
        return model

    with deterministic(), tempfile.TemporaryDirectory() as folder:
        whole = fit(7, callbacks=[Save()])
        places = (1, 6, 11, 12, 17)
        for done in places:
            rest = fit(99, ckpt_path=f"{folder}/{done}.ckpt")
            assert_equal(rest.losses, whole.losses[done:], rest.weights(), whole.weights())
    return f"from {len(places)} places"
