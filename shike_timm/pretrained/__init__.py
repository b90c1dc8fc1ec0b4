"""Trained models, read and written."""
