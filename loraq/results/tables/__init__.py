"""Tables of records as Markdown, LaTeX and CSV. Reads only records, without torch.

Imported by the other packages of `results` and by the runner.
"""

from loraq.results.tables.tables import (
    all_tables,
    limits_table,
    load_records,
    main_table,
    paired_table,
    render_tables,
    splits_table,
    write_tables,
)

__all__ = [
    "all_tables",
    "limits_table",
    "load_records",
    "main_table",
    "paired_table",
    "render_tables",
    "splits_table",
    "write_tables",
]
