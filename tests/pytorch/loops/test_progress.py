"""The cursor of a run: what it says runs next, and that it goes through a checkpoint."""

from __future__ import annotations

import pytest
import torch

from lightning.pytorch.loops.progress import FitProgress, Next


@pytest.mark.parametrize("following", list(Next))
def test_cursor_goes_through_a_file_as_plain_data(following: Next) -> None:
    progress = FitProgress(epoch=3, batch_idx=2, total_batches=17, global_step=9, stepped=8, next=following)
    torch.save(progress.state_dict(), "progress.pt")
    restored = FitProgress()
    restored.load_state_dict(torch.load("progress.pt", weights_only=True))
    assert restored == progress
    assert restored.next is following


@pytest.mark.parametrize(
    ("following", "epoch"), [(Next.BATCH, 3), (Next.VALIDATE, 3), (Next.EPOCH_END, 3), (Next.EPOCH, 4)], ids=lambda value: str(value)
)
def test_anew_means_the_start_of_an_epoch_that_is_not_over(following: Next, epoch: int) -> None:
    progress = FitProgress(epoch=3, batch_idx=2, total_batches=17, global_step=9, stepped=8, next=following)
    progress.start_anew()
    assert progress == FitProgress(epoch=epoch, batch_idx=0, total_batches=17, global_step=9, stepped=8, next=Next.BATCH)


def test_cursor_tells_the_hooks_what_follows(Evaluated: type, make_trainer: object, numbers: object) -> None:
    seen: list[tuple[str, str, int]] = []

    class Model(Evaluated):  # type: ignore[misc, valid-type]
        def note(self, hook: str) -> None:
            progress = self.trainer.fit_loop.progress
            seen.append((hook, progress.next.value, progress.batch_idx))

        def on_train_batch_end(self, *args: object) -> None:
            self.note("batch end")

        def on_validation_start(self) -> None:
            self.note("validation start")

        def on_validation_end(self) -> None:
            self.note("validation end")

        def on_train_epoch_end(self) -> None:
            self.note("epoch end")

    make_trainer(val_check_interval=2).fit(Model(), numbers(4), numbers(1))  # type: ignore[operator]
    assert seen == [
        ("batch end", "batch", 1),
        ("batch end", "validate", 2), ("validation start", "validate", 2), ("validation end", "batch", 2),
        ("batch end", "batch", 3),
        ("batch end", "validate", 4), ("validation start", "validate", 4), ("validation end", "epoch_end", 4),
        ("epoch end", "epoch", 4),
    ]  # fmt: skip
