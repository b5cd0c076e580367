"""Bytes on disk: checkpoints that come in, model stores that we write."""
