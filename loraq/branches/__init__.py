"""Branch finders: ways to find the low-rank factors L and R. One file a kind, looked up by name.

A finder is a function `find(problem, options) -> Solution`, here or in a user's own file. Imported
by quantization; imports config, formats and below.
"""

from loraq.branches.lookup import find
from loraq.branches.problem import OutputError, Problem, Solution

__all__ = ["OutputError", "Problem", "Solution", "find"]
