"""Checkpoint files: what they may hold (``format``), and how they are written and read (``io``)."""
