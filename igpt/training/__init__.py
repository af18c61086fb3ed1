"""Pretraining: options, data, objectives, loop, optimizer, checkpoints, run folder."""
