"""Random input for everything that reads a user's text or a stored file: `make test-fuzz`."""
