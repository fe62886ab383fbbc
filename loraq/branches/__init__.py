"""Branch finders: algorithms for the low-rank factors L and R, one module per kind.

A finder is a function `find(problem, options) -> Solution`, in a module of this package or in a
user's file; `find` looks it up by name or path. Imported by quantization; imports config and below.
"""

from loraq.branches.lookup import run_finder as find
from loraq.branches.problem import OutputError, Problem, Solution

__all__ = ["OutputError", "Problem", "Solution", "find"]
