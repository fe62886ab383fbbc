"""Helpers that know nothing of quantisation: files, hashes, plain data, memory, the console.

Everything may import them; they import `loraq.errors` alone.
"""
