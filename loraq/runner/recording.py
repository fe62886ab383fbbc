"""The text of any pipeline: what its own call encodes is recorded once, and answered from there.

The arguments of `encode_prompt`, how often it is called and what it returns differ from pipeline to
pipeline. So the pipeline's `__call__` runs up to the latents with its text encoders, and every call
of a method with "prompt" in its name is kept (`encode_prompt`, but also one that rewrites prompts):
the arguments by name, and the returned structure with its named tensors. Later the same call of the
pipeline, without text encoders, gets these answers, if it asks with the same arguments.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import json
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraq.errors import LoraqError
from loraq.models.denoisers import denoiser_of, parts
from loraq.runner.kept_values import comparable, describe, rebuild

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RECORDED = "recorded"
"""Key of a safetensors file's metadata: the calls as JSON."""
_LEFT_OUT = ("self", "device")
"""Arguments of text methods that are not compared."""
_Answering = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Answer:
    """One call of a method: its arguments by name, and what it returned (`kept_values.py`)."""

    method: str
    arguments: dict[str, Any]
    result: dict[str, Any]


@dataclass(frozen=True, repr=False, eq=False)
class Recording:
    """What consecutive calls of a pipeline encoded: tensors by name, and for each call its answers.

    calls: (number of prompts, answers in order).
    """

    calls: Sequence[tuple[int, Sequence[Answer]]]
    tensors: dict[str, Tensor]

    def __repr__(self) -> str:
        counts = [count for count, _ in self.calls]
        return f"Recording(prompts={counts}, {len(self.tensors)} tensors)"

    def part(self, start: int, count: int) -> Recording:
        """That of `count` prompts from `start` on; LoraqError if no call encoded just these."""
        before = 0
        for own, answers in self.calls:
            if (before, own) == (start, count):
                return Recording([(own, answers)], self.tensors)
            before += own
        raise LoraqError(
            f"Prompts {start + 1} to {start + count} of a batch are generated together, and its "
            f"text was encoded {[own for own, _ in self.calls]} prompts at a time. Remove these "
            "embeddings from outputs/embeddings, and run again."
        )

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        from safetensors.torch import save

        calls = [[count, [asdict(answer) for answer in answers]] for count, answers in self.calls]
        return save(self.tensors, metadata={RECORDED: json.dumps(calls)})

    @classmethod
    def read(cls, metadata: str, tensors: dict[str, Tensor]) -> Recording:
        """From the contents of a file: metadata (`RECORDED`) and tensors."""
        calls = json.loads(metadata)
        return cls(
            [(count, [Answer(**answer) for answer in answers]) for count, answers in calls], tensors
        )

    @contextlib.contextmanager
    def answering(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """The pipeline's next call gets the answers of this recording, of one call, in its order.

        LoraqError if the pipeline asks with other arguments, for more, or for less. Without answers
        it encodes its prompts itself.
        """
        ((_, answers),) = self.calls
        if not answers:
            yield
            return
        left, device = iter(answers), pipe.device

        def answer(name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            expected, asked = next(left, None), _arguments(method, args, kwargs)
            if expected is None or (expected.method, expected.arguments) != (name, asked):
                raise _other_question(pipe, Answer(name, asked, {}), expected)
            return rebuild(expected.result, self.tensors, device)

        with _methods_through(pipe, answer):
            yield
        if unused := next(left, None):
            raise _other_question(pipe, None, unused)


class _Encoded(Exception):
    """Ends a call of the pipeline when its text is encoded."""


def record(
    pipe: DiffusionPipeline,
    groups: Sequence[int],
    call: Callable[[int], object],
    casts: Mapping[torch.dtype, torch.dtype] | None = None,
) -> Recording:
    """What calls of the pipeline encode, one for each group of prompts.

    groups: the number of prompts of each call. call: makes the call of group 0, 1, …, which ends at
    its latents or at the first forward of a denoiser. casts: dtypes of tensors that are kept in
    another one, that of the denoiser. A method that rewrites prompts draws the same
    random numbers in each call. LoraqError if a call encodes nothing, or nothing that can be kept.
    """
    tensors: dict[str, Tensor] = {}
    calls: list[tuple[int, list[Answer]]] = []
    device = pipe.device

    def keep(name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        arguments, result = _arguments(method, args, kwargs), method(*args, **kwargs)
        answers = calls[-1][1]
        place = f"{len(calls) - 1}.{len(answers)}"
        kept = describe(result, place, returned_names(method), tensors, device)
        answers.append(Answer(name, arguments, kept))
        return result

    for number, count in enumerate(groups):
        calls.append((count, []))
        with (
            contextlib.suppress(_Encoded),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            _stopped_at_latents(pipe),
            _methods_through(pipe, keep),
        ):
            torch.manual_seed(0)
            call(number)
        if not calls[-1][1]:
            raise LoraqError(
                f"{type(pipe).__name__} calls none of its {', '.join(text_methods(type(pipe)))} "
                "before its latents, so its text cannot be kept."
            )
    dtypes = casts or {}
    return Recording(calls, {n: x.to(dtypes.get(x.dtype, x.dtype)) for n, x in tensors.items()})


@contextlib.contextmanager
def _stopped_at_latents(pipe: DiffusionPipeline) -> Iterator[None]:
    """`prepare_latents` and the forward of a denoiser raise _Encoded inside the block."""

    def stop(*_args: Any, **_kwargs: Any) -> Any:
        raise _Encoded

    denoisers = parts(denoiser_of(pipe)).values()
    handles = [network.register_forward_pre_hook(stop) for network in denoisers]
    try:
        with _attributes(pipe, {"prepare_latents": stop}):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _methods_through(pipe: DiffusionPipeline, answer: _Answering) -> Iterator[None]:
    """Calls of the pipeline's text methods go to `answer(name, method, args, kwargs)`.

    Calls that such a method itself makes do not.
    """
    busy = False

    def through(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:
                return method(*args, **kwargs)
            busy = True
            try:
                return answer(name, method, args, kwargs)
            finally:
                busy = False

        return called

    names = text_methods(type(pipe))
    with _attributes(pipe, {name: through(name, getattr(pipe, name)) for name in names}):
        yield


@contextlib.contextmanager
def _attributes(owner: object, values: dict[str, Any]) -> Iterator[None]:
    """The object, not its class, has these attributes inside the block."""
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]


def text_methods(pipeline: type) -> list[str]:
    """The methods of a pipeline's class with "prompt" in their names."""
    kinds = (types.FunctionType, staticmethod, classmethod)
    return [
        name
        for name in dir(pipeline)
        if "prompt" in name and isinstance(inspect.getattr_static(pipeline, name), kinds)
    ]


def returned_names(method: Callable[..., Any]) -> list[str]:
    """The names of the values that a method's last line returns; [] if these are not all names."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))
    except (OSError, TypeError, SyntaxError):  # no source, as of a method made at run time
        return []
    last = getattr(tree.body[0], "body", [None])[-1]
    value = last.value if isinstance(last, ast.Return) else None
    found = value.elts if isinstance(value, ast.Tuple) else [value]
    names = [entry.id for entry in found if isinstance(entry, ast.Name)]
    return names if len(set(names)) == len(found) else []


def _arguments(method: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, with defaults, as `comparable` values."""
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    return {
        name: comparable(value, f"{method.__qualname__}({name}=…)")
        for name, value in bound.arguments.items()
        if name not in _LEFT_OUT
    }


def _other_question(
    pipe: DiffusionPipeline, asked: Answer | None, expected: Answer | None
) -> LoraqError:
    found, kept = ((entry.method if entry else "nothing") for entry in (asked, expected))
    if asked and expected and found == kept:
        names = {**expected.arguments, **asked.arguments}
        pairs = {name: (asked.arguments.get(name), expected.arguments.get(name)) for name in names}
        different = [f"{name}={a!r}, not {b!r}" for name, (a, b) in pairs.items() if a != b]
        found, kept = f"{found} with {'; '.join(different)[:300]}", "it"
    return LoraqError(
        f"{type(pipe).__name__} asks for {found} where its text was encoded by {kept}: these "
        "embeddings were made for another call. Remove them from outputs/embeddings, and run again."
    )
