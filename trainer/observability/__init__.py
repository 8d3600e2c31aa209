"""What shows a run while it goes on: metrics, their files and endpoint, progress, profiles."""
