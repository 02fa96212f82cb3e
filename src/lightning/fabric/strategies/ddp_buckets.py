"""The buckets in which DDP sums gradients: with three processes or more, how a sum is rounded depends on its place in them.

DDP lays its buckets out anew after the first backward pass, in the order in which gradients became ready. A run that is resumed would
take its first step with the layout of a first step, and go on to other last bits. So checkpoints hold the order, and a resumed run has
it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class Ordered(DistributedDataParallel):
    """DDP whose buckets hold the parameters in a given order from the first step on.

    Args:
        module: what it wraps.
        order: the names of its trained parameters.
        kwargs: those of DDP.
    """

    def __init__(self, module: Any, order: Sequence[str], **kwargs: Any) -> None:
        self._places = {name: place for place, name in enumerate(order)}
        super().__init__(module, **kwargs)
        # Its parameters are in that order, so what DDP finds after a backward pass over all of them can be said before.
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self) -> Any:
        parameters, expect_sparse = super()._build_params_for_reducer()
        names = names_of(self)
        pairs = sorted(zip(parameters, expect_sparse), key=lambda pair: self._places[names[pair[0]]])
        return [parameter for parameter, _ in pairs], [sparse for _, sparse in pairs]


def names_of(ddp: DistributedDataParallel) -> dict[Tensor, str]:
    """The name that each trained parameter has in the wrapped module."""
    return {parameter: name for name, parameter in ddp.module.named_parameters() if parameter.requires_grad}


def order_of(ddp: DistributedDataParallel) -> list[str]:
    """The names of the parameters in the order of DDP's buckets; none before these have got their order. Every process must call it."""
    names, reducer = names_of(ddp), ddp.reducer
    if reducer._rebuild_buckets():  # which DDP does with its next forward pass, if a backward pass has been
        buckets = reducer._get_zeros_like_grad_buckets()  # they take memory, for this once: DDP describes them after that forward pass
        return [names[parameter] for bucket in buckets for parameter in bucket.parameters()]
    facts = ddp._get_ddp_logging_data()
    if "rebuilt_per_bucket_param_indices" not in facts:
        return []
    in_turn = [names[parameter] for parameter in ddp._build_params_for_reducer()[0]]
    return [in_turn[int(index)] for bucket in facts["rebuilt_per_bucket_param_indices"].split(",") for index in bucket.split()]
