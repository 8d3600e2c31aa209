"""The process group of a run, its heartbeat and watchdog, errors raised on all ranks, and collectives on arrays."""
