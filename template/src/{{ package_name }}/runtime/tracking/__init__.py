"""The run: opening it, logging to it, ending it."""
