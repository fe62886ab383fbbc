"""Layouts of checkpoints that other programs read: export to them, and emulation of their files.

`export.py` writes and `importing.py` reads; each other target is one file that defines a `Target`.
"""
