"""Look up a branch finder by name or in a user's file, run it and check its result."""

from __future__ import annotations

import importlib

from torch import Tensor

from loraq.branches.problem import Problem, Solution
from loraq.config import BranchConfig
from loraq.errors import LoraqError
from loraq.utils.user_module import is_user_file, load_user_module, running


def run_finder(problem: Problem, options: BranchConfig) -> Solution:
    """Run the finder of `options.kind`: a module of `loraq.branches`, or the path of a user's file.

    Raises LoraqError if the finder changes `problem.weight_BOI` in place, or if its solution has
    the wrong type or shapes, or contains NaN or Inf.
    """
    if is_user_file(options.kind):
        module = load_user_module(options.kind, "find")
    else:
        with running(options.kind, "its import"):
            module = importlib.import_module(f"loraq.branches.{options.kind}")
    before = _version(problem.weight_BOI)
    with running(options.kind, "find()"):
        solution = module.find(problem, options)
    if _version(problem.weight_BOI) != before:
        raise LoraqError(
            f"{options.kind}: find() changed problem.weight_BOI in place, but the main weight is "
            "computed from it. Work on a clone()."
        )
    _check_solution(solution, problem, options.kind)
    return solution


def _version(tensor: Tensor) -> int | None:
    """The number of in-place changes; None for inference tensors, which do not count them."""
    return None if tensor.is_inference() else tensor._version


def _check_solution(solution: Solution, problem: Problem, kind: str) -> None:
    """Raise LoraqError unless `solution` is a Solution with finite factors that fit the problem."""
    if not isinstance(solution, Solution):
        raise LoraqError(
            f"{kind}: find() returned a {type(solution).__name__}. Return "
            "Solution(left_BOR, right_BRI, residual=…) from loraq.branches."
        )
    b, o, i = problem.weight_BOI.shape
    found = tuple(solution.left_BOR.shape), tuple(solution.right_BRI.shape)
    wanted = (b, o, problem.rank), (b, problem.rank, i)
    if found != wanted:
        raise LoraqError(
            f"{kind}: find() returned factors of shapes {found[0]} and {found[1]}; units × out × "
            f"rank and units × rank × in are {wanted[0]} and {wanted[1]}. Fix the shapes."
        )
    if not isinstance(solution.residual, bool):
        raise LoraqError(f"{kind}: Solution.residual is {solution.residual!r}. Set True or False.")
    if solution.left_BOR.isfinite().all() & solution.right_BRI.isfinite().all():
        return
    for name in ("left_BOR", "right_BRI"):
        if bad := int((~getattr(solution, name).isfinite()).sum()):
            raise LoraqError(
                f"{kind}: find() returned {name} with {bad} values that are NaN or Inf. Fix the "
                "computation of the factor."
            )
