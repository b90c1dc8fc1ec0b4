"""Reading and writing of trained models."""
