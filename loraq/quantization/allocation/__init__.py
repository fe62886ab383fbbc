"""Ranks and bits of each unit under one memory budget."""
