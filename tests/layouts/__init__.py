"""Layouts of other programs."""
