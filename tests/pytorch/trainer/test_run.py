"""What happens around the loop of one call, and that a trainer can be used again and again."""

from __future__ import annotations

from typing import Any

import torch


def test_checkpoint_saved_after_a_test_holds_the_optimizers_of_the_fit(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    trainer, model = make_trainer(), Model()
    trainer.fit(model, numbers(3), numbers(1))
    trainer.test(model, numbers(2), verbose=False)
    assert trainer.optimizers[0].state[model.weight]["step"] == 3
    trainer.save_checkpoint("after.ckpt")
    resumed, again = make_trainer(max_epochs=2), Model()
    resumed.fit(again, numbers(3), numbers(1), ckpt_path="after.ckpt")
    assert resumed.optimizers[0].state[again.weight]["step"] == 6
    trainer.test(again, numbers(2), verbose=False)
    assert trainer.optimizers == []  # those of the other model, which must not be saved with this one's weights
