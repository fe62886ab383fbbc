"""Helpers without any quantisation: files, hashes, plain data, memory, console output.

All packages may import them; they import only `loraq.errors`.
"""
