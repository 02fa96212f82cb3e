"""The documented import path of SingleDeviceXLAStrategy."""

from lightning.fabric.strategies.single_xla import SingleDeviceXLAStrategy

__all__ = ["SingleDeviceXLAStrategy"]
