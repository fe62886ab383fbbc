"""A backward pass in Python: PyTorch's engine starts threads for devices that exist."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.simulated.tensors import SimulatedTensor

Node = torch.autograd.graph.Node


def run_backward(
    real: Any, outputs: Sequence[Any], grads: Sequence[Any], *rest: Any, **options: Any
) -> Any:
    """`torch.autograd`'s `run_backward`; `.backward()` of simulated tensors, in the same order."""
    if not any(isinstance(x, SimulatedTensor) for x in outputs):
        return real(outputs, grads, *rest, **options)
    if not options.get("accumulate_grad"):
        raise NotImplementedError("torch.autograd.grad is not simulated; use .backward()")
    held: dict[Node, dict[int, Tensor]] = {}
    for output, grad in zip(outputs, grads, strict=True):
        held.setdefault(output.grad_fn, {})[output.output_nr] = grad
    waiting = _edges_into(list(held))
    ready = [(-node._sequence_nr(), id(node), node) for node in held if not waiting[node]]
    heapq.heapify(ready)
    with torch.no_grad():
        while ready:
            node = heapq.heappop(ready)[-1]
            given = held.pop(node, {})
            inputs = [given.get(number) for number in range(max(given, default=0) + 1)]
            made = node(*inputs)
            made = made if isinstance(made, tuple) else (made,)
            for grad, (following, number) in zip(made, node.next_functions, strict=False):
                if following is None:
                    continue
                if grad is not None:
                    grad = _fitted(grad, following._input_metadata[number])
                    slot = held.setdefault(following, {})
                    slot[number] = slot[number] + grad if number in slot else grad
                waiting[following] -= 1
                if not waiting[following]:
                    heapq.heappush(ready, (-following._sequence_nr(), id(following), following))
    return ()


def _edges_into(roots: Sequence[Node]) -> Counter[Node]:
    """Node → number of edges that lead to it."""
    edges: Counter[Node] = Counter()
    seen, stack = set(roots), list(roots)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is None:
                continue
            edges[following] += 1
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return edges


def _fitted(grad: Tensor, wanted: Any) -> Tensor:
    """`grad` of the shape and dtype of what it is the gradient of, which was broadcast."""
    if grad.shape != wanted.shape:
        grad = grad.sum_to_size(wanted.shape)
    return grad.to(wanted.dtype)
