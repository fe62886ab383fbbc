"""Generated blocks of the documentation pages: tables, run times, benchmarks. No torch.

Imported by `loraq.readme` and `loraq.results.__main__`; imports records and tables.
"""
