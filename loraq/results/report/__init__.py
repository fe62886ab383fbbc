"""One self-contained HTML page per experiment: tables, diagrams, images, configurations.

The page is made from records and image files and needs no network and no server. Imported by the
command line; imports tables, plots and records.
"""

from loraq.results.report.page import write_report

__all__ = ["write_report"]
