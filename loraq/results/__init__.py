"""Results: records (one per row), and tables, plots, documentation pages, reports and W&B runs.

All modules read records. `record`, `tables`, `pages` and `committed` do not need torch. Imported by
the runner and the command line; imports the public API, the metrics' statistics and below.
"""
