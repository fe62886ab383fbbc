"""The experiment: START with `experiment.py`, the stages in order.

`product_keys` names products, `plan` decides what to make, `store` keeps it, `session` holds the
loaded pipeline. Imported by the command and the entry points alone.
"""
