"""Checkpoints: reading the official, fla and converted formats, and writing converted ones."""
