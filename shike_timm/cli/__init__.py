"""The commands, one module each: `shike NAME`."""
