"""Trained models: folders and checkpoints, read and written."""
