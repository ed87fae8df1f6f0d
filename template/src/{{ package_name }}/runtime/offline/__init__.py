"""Runs that are kept on disk first, and replayed to a server that may go away."""
