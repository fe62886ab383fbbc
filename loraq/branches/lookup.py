"""Run a branch finder by name, or from a user's own file, and check what it returned."""

from __future__ import annotations

import importlib

from torch import Tensor

from loraq.branches.problem import Problem, Solution
from loraq.config import BranchConfig
from loraq.errors import LoraqError
from loraq.utils.user_module import is_user_file, load_user_module


def find(problem: Problem, options: BranchConfig) -> Solution:
    """Run the finder named by `options.kind`, or the one in the file of that path."""
    if is_user_file(options.kind):
        module = load_user_module(options.kind, "find")
    else:
        module = importlib.import_module(f"loraq.branches.{options.kind}")
    before = _changes(problem.weight_BOI)
    solution = module.find(problem, options)
    if _changes(problem.weight_BOI) != before:
        raise LoraqError(
            f"{options.kind}: find() changed problem.weight_BOI in place, and what main rounds "
            "is taken from it. Work on a clone()."
        )
    return _checked(solution, problem, options.kind)


def _changes(tensor: Tensor) -> int | None:
    """How often it was changed in place; inference tensors have no count."""
    return None if tensor.is_inference() else tensor._version


def _checked(solution: Solution, problem: Problem, kind: str) -> Solution:
    """What a finder returned; LoraqError where it is no Solution or its factors do not fit."""
    if not isinstance(solution, Solution):
        raise LoraqError(
            f"{kind}: find() returned a {type(solution).__name__}. Return "
            "Solution(left_BOR, right_BRI, residual=…) of loraq.branches."
        )
    b, o, i = problem.weight_BOI.shape
    found = tuple(solution.left_BOR.shape), tuple(solution.right_BRI.shape)
    wanted = (b, o, problem.rank), (b, problem.rank, i)
    if found != wanted:
        raise LoraqError(
            f"{kind}: find() returned factors of shapes {found[0]} and {found[1]}; units × out × "
            f"rank and units × rank × in are {wanted[0]} and {wanted[1]}. Mend the shapes."
        )
    if not isinstance(solution.residual, bool):
        raise LoraqError(f"{kind}: Solution.residual is {solution.residual!r}. Give True or False.")
    for name in ("left_BOR", "right_BRI"):
        if bad := int((~getattr(solution, name).isfinite()).sum()):
            raise LoraqError(
                f"{kind}: find() returned {name} with {bad} values that are NaN or Inf. Mend what "
                "makes them."
            )
    return solution
