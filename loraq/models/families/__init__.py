"""One file a model family: its layers' roles, its default skip list, what its weights tell.

Looked up by name (`models/layers.py`); imports `models.roles` and `models.moments` alone.
"""
