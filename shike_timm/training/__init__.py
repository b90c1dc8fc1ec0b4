"""Training: phases, methods, the trainer, run folders."""
