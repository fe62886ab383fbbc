"""What decides how an operator behaves on a device: what it writes to, whether the host waits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten
INDEXING = {
    aten.index.Tensor, aten.index_put.default,
    aten.index_put_.default, aten._index_put_impl_.default,
}  # fmt: skip
DECOMPOSITIONS = {"_linalg_eigh", "_linalg_svd", "_linalg_check_errors", "linalg_eig"}
"""Operations that read back on the host whether they succeeded; those named `_ex` do not."""
FLOAT64 = {
    *DECOMPOSITIONS, "mm", "bmm", "addmm", "baddbmm", "linalg_cholesky_ex", "linalg_qr",
    "linalg_solve_triangular", "_linalg_solve_ex", "linalg_inv_ex", "linalg_lu_factor_ex",
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """What the simulation needs to know of an operator.

    view: whether it returns a view; waits: whether the host reads a result; writes: of arguments
    (position, name, alias).
    """

    name: str
    composite: bool
    view: bool
    waits: bool
    linear_algebra: bool
    writes: tuple[tuple[int, str, str], ...]

    def written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Alias → argument that the operator writes to: in place, or `out=`."""
        return {
            alias: args[number] if number < len(args) else kwargs.get(name)
            for number, name, alias in self.writes
        }


@functools.cache
def operation(func: Any) -> Operation:
    """The facts of an operator (`torch.ops`)."""
    name = func._schema.name.partition("::")[2]
    reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}
    composite = "CompositeImplicitAutograd"
    return Operation(
        name=name.removeprefix("_"),
        composite=torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite),
        view=any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns),
        waits=name in DECOMPOSITIONS or (bool(reads) and func not in INDEXING),
        linear_algebra=name in FLOAT64,
        writes=tuple(
            (number, argument.name, alias)
            for number, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for alias in argument.alias_info.after_set
        ),
    )
