"""A page with figures that shows where a long-tailed model is right and where it is wrong."""
