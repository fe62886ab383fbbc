"""Allocate rank and bits to each unit within one memory budget.

`allocate.py` states the problem, `prediction.py` predicts each option's error, `solver.py` solves
it. Imported by `group_work.py`; imports budget, grouping, formats and config.
"""
