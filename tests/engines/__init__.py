"""Exported checkpoints against the packages that read them: `make test-engines`."""
