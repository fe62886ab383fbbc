"""Generated blocks of the documentation pages: tables, run times, benchmarks. No torch."""
