"""Records → tables as Markdown, LaTeX and CSV. Reads records and nothing else."""

from loraq.results.tables.tables import all_tables, load_records, main_table, write_tables

__all__ = ["all_tables", "load_records", "main_table", "write_tables"]
