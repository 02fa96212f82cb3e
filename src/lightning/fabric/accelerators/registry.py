"""Accelerators by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.registry import Registry

C = TypeVar("C", bound=Callable[..., Accelerator])

# What "auto" tries, in this order.
AUTO_ORDER = ("cuda", "mps", "tpu", "cpu")


class AcceleratorRegistry(Registry):
    """Accelerator classes by name, so that ``Trainer(accelerator="name")`` finds them.

    Example::

        >>> from lightning.fabric.accelerators import CPUAccelerator
        >>> registry = AcceleratorRegistry()
        >>> @registry.register("quiet_cpu", description="a CPU that says nothing")
        ... class QuietCPU(CPUAccelerator):
        ...     pass
        >>> type(registry.get("quiet_cpu")).__name__
        'QuietCPU'
    """

    kind, article = "accelerator", "an"

    def register(
        self,
        name: str,
        accelerator: C | None = None,
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> Any:
        """Enter an accelerator; without ``accelerator`` the result is a decorator for its class.

        Args:
            name: the name for ``Trainer(accelerator=name)``.
            accelerator: the class, or a function that returns an instance.
            description: a line about it.
            override: whether it may take the place of another of the same name.
            init_params: keywords for ``accelerator`` when it is called.

        Raises:
            TypeError: if ``name`` is not a string.
            MisconfigurationException: if the name is taken and ``override`` is False.
        """
        return self.enter(name, accelerator, description, override, init_params)

    def available_accelerators(self) -> set[str]:
        """Return the names that are registered, whether or not this machine has such devices."""
        return set(self)

    def __str__(self) -> str:
        return f"Registered accelerators: {', '.join(self)}"


ACCELERATOR_REGISTRY = AcceleratorRegistry()


def choose_accelerator(accelerator: str | Accelerator = "auto") -> Accelerator:
    """Return the accelerator for ``Trainer(accelerator=...)``.

    Args:
        accelerator: ``"auto"`` (GPU, then MPS, then TPU, then CPU), ``"gpu"`` (CUDA or MPS, whichever there is), a
            registered name, or an instance.

    Raises:
        ValueError: if no accelerator has that name.
        MisconfigurationException: if this machine has no such device.

    Example::

        >>> from lightning.fabric.accelerators import choose_accelerator
        >>> choose_accelerator("cpu").name()
        'cpu'
    """
    if isinstance(accelerator, Accelerator):
        return accelerator
    if accelerator == "auto":
        accelerator = next(name for name in AUTO_ORDER if is_present(name) and not is_stand_in(name))
    elif accelerator == "gpu":
        accelerator = next((name for name in ("cuda", "mps") if is_present(name)), "gpu")
        if accelerator == "gpu":
            raise MisconfigurationException(
                'accelerator="gpu" was asked for, and this machine has neither a CUDA device nor an MPS device that this '
                f"build of PyTorch can use. Present: {present_accelerators()}. "
                'Use accelerator="auto" or "cpu", or install a PyTorch build with CUDA and check that `nvidia-smi` lists the device.'
            )
    elif not isinstance(accelerator, str) or accelerator not in ACCELERATOR_REGISTRY:
        names = ", ".join(["auto", "gpu", *ACCELERATOR_REGISTRY])
        raise ValueError(f"accelerator={accelerator!r} is not known. Accepted: {names}, or an instance of Accelerator.")
    elif not is_present(accelerator):
        hint = ""
        if accelerator == "tpu":
            ACCELERATOR_REGISTRY.get(accelerator)  # says what to install where torch_xla is what's missing
            hint = " To test on a machine without TPUs, set the environment variable PJRT_DEVICE=CPU."
        raise MisconfigurationException(
            f'accelerator="{accelerator}" was asked for, and this machine has no such device. '
            f'Present: {present_accelerators()}. Use one of those, or accelerator="auto".{hint}'
        )
    return ACCELERATOR_REGISTRY.get(accelerator)  # type: ignore[no-any-return]


def is_present(name: str) -> bool:
    return name in ACCELERATOR_REGISTRY and bool(ACCELERATOR_REGISTRY[name]["accelerator"].is_available())


def is_stand_in(name: str) -> bool:
    """Whether other devices stand in for those of this name, which is for tests, and never chosen unasked."""
    return bool(getattr(ACCELERATOR_REGISTRY[name]["accelerator"], "is_stand_in", bool)())


def present_accelerators() -> list[str]:
    return [name for name in ACCELERATOR_REGISTRY if is_present(name)]
