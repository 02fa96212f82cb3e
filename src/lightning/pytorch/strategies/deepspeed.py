"""The documented import path of DeepSpeedStrategy."""

from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy

__all__ = ["DeepSpeedStrategy"]
