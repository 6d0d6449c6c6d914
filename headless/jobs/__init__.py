"""Runs: the folder that holds one, the worker that carries it out, the queue that starts workers."""
