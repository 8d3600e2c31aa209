"""The process group of a run, errors that all ranks learn of, and collectives on arrays."""
