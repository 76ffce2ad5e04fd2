"""Reading and writing checkpoints."""

from optimum_comp.checkpoint.writer import save_checkpoint, upload


__all__ = ["save_checkpoint", "upload"]
