"""Plots of records and image files: image grids, heat maps, diagrams. No measurements.

Imported by the report, the runner and `committed`; imports records and tables.
"""
