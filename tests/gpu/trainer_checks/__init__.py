"""The parts of ``tests/gpu/check_trainer_cuda.py``."""
