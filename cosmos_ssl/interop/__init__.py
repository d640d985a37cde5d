"""Interop: checkpoints of other programs, read and written."""
