"""The only Ray: sources, stages, dealing, the worker's loop, search and job submission."""
