"""Results: one record a row, and what people read: tables, plots, pages, reports, W&B.

Everything here reads records; `record`, `tables`, `pages` and `committed` need no torch. Imported
by the runner; imports the public API, metrics' statistics and below.
"""
