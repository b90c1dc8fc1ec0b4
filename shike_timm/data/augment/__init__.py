"""Augmentation: of one image at a time, and of whole batches."""
