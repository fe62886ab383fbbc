"""Networks of the metrics; their weights are in installed packages or in the user's files."""
