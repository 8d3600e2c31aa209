"""The state of a run on a disk or an object store: written beside training, verified, found again."""
