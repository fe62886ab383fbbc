"""One self-contained HTML page of an experiment: tables, diagrams, images, configurations.

Made from records and image files alone; it needs neither a network nor a server to be read.
"""

from loraq.results.report.page import write_report

__all__ = ["write_report"]
