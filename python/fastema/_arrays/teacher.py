"""A torch module that computes with tensors that are given, in the place of its own, and never trains."""

import copyreg
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cache, partial
from typing import Any

from .._types import AnyArray
from .modules import Members, members_of, unwrapped


@cache
def _teacher() -> Any:
    """Return what a teacher's class has before that of its model: it stays where and how it is."""
    import torch  # noqa: PLC0415 - loaded already, here and below: who asks has a module

    class Teacher(torch.nn.Module):
        def train(self, mode: bool = True) -> Any:  # noqa: ARG002 - what holds it asks at each epoch
            return super().train(False)

        def requires_grad_(self, requires_grad: bool = True) -> Any:
            if requires_grad:
                raise RuntimeError(f"{_MADE} never trains: copy.deepcopy() it, and train the copy")
            return self

        def share_memory(self) -> Any:
            raise RuntimeError(f"{_MADE} {_STAYS}")

        def _apply(self, fn: Callable[[AnyArray], AnyArray], recurse: bool = True) -> Any:  # noqa: ARG002
            tensors: Iterable[AnyArray] = (*self.parameters(), *self.buffers())
            for tensor in tensors:
                probe: AnyArray = tensor.new_empty(0)  # of the same type and device
                if fn(probe) is not probe or probe.is_shared() != tensor.is_shared():
                    raise RuntimeError(f"{_MADE} {_STAYS}")
            return self

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Let copies and pickles be plain modules with tensors of their own."""
            reduced: Any = super().__reduce_ex__(protocol)
            make, arguments, *state = reduced
            if make is copyreg.__newobj__:  # type: ignore[attr-defined]
                kind = type(self).__mro__[2]
                make, arguments = kind.__new__, (kind, *arguments[1:])
            return (make, arguments, *state)

    return Teacher


_MADE = "a module that ema.module() returned"
_STAYS = (
    "lies in the memory of the averages, and cannot be moved or cast: move the model, call ema.rebind(model) "
    "and make another; or copy.deepcopy() it for a module of its own"
)


def teacher_of(
    module: AnyArray, tensors: Mapping[int, AnyArray], kinds: Mapping[AnyArray, AnyArray]
) -> tuple[AnyArray, dict[int, AnyArray]]:
    """Return a module that computes as another does, with other tensors.

    Args:
        module: The other one, which is left as it is. Wrappers around it are looked through.
        tensors: By the identity of its parameters and buffers, what takes their place. Others are shared.
        kinds: The types of its tensors, and of those given for them where that is another: arguments of
            ``forward`` are cast alike.

    Returns:
        That module, and by the same identities its parameters and buffers.

    Raises:
        TypeError: The module cannot be copied, or copies what it holds by itself.
        ValueError: A parameter for which nothing is given is trained.
    """
    module = unwrapped(module)
    theirs = members_of(module, buffers=True)
    placed = _placed(theirs, tensors)
    try:
        made = deepcopy(module, dict(placed))
    except Exception as reason:
        raise TypeError(
            f"values must be a module that copy.deepcopy() takes for module(), got {type(module).__name__}: "
            f"{reason}"
        ) from reason
    _check_copy(made, theirs, placed)
    if kinds:
        _cast_buffers(made, kinds)
        made.register_forward_pre_hook(partial(_cast_arguments, dict(kinds)), with_kwargs=True, prepend=True)
    made.train(False)
    kind = type(made)
    made.__class__ = type(kind.__name__, (_teacher(), kind), {"__module__": kind.__module__})
    return made, placed


def _placed(members: Members, tensors: Mapping[int, AnyArray]) -> dict[int, AnyArray]:
    """Return by the identity of each parameter and buffer what takes its place."""
    import torch  # noqa: PLC0415

    placed: dict[int, AnyArray] = {}
    for name, parameter in members.parameters.items():
        if id(parameter) not in tensors and parameter.requires_grad:
            raise ValueError(
                f"values[{name!r}] must be averaged for module(), and only= leaves it out though it is "
                "trained: a teacher would share and train it; average it, or a part of the model alone"
            )
        given = tensors.get(id(parameter))
        placed[id(parameter)] = parameter if given is None else torch.nn.Parameter(given, requires_grad=False)
    for buffer in members.buffers.values():
        placed[id(buffer)] = tensors.get(id(buffer), buffer)
    return placed


def _check_copy(made: AnyArray, theirs: Members, placed: Mapping[int, AnyArray]) -> None:
    """Raise if a copy of a module holds other tensors than are to be in it.

    Raises:
        TypeError: It does: a class has a way of its own to copy.
    """
    ours = members_of(made, buffers=True)
    found = {**ours.parameters, **ours.buffers}
    for name, tensor in {**theirs.parameters, **theirs.buffers}.items():
        if found.get(name) is not placed[id(tensor)]:
            raise TypeError(
                "values must be a module without a way of its own to copy for module(), and "
                f"{type(made).__name__} copies {name!r}: use ema.copy_to(other)"
            )


def _cast_buffers(module: AnyArray, kinds: Mapping[AnyArray, AnyArray]) -> None:
    """Cast buffers that no checkpoint holds, which are the module's own."""
    for part in module.modules():
        for key in part._non_persistent_buffers_set:
            if (buffer := part._buffers.get(key)) is not None and buffer.dtype in kinds:
                part._buffers[key] = buffer.to(kinds[buffer.dtype])


def _cast_arguments(
    kinds: dict[AnyArray, AnyArray], _: AnyArray, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, Any]:
    return _cast(arguments, kinds), _cast(keywords, kinds)


def _cast(x: Any, kinds: dict[AnyArray, AnyArray]) -> Any:
    """Return arguments with tensors of some types cast to others."""
    if type(x) in (tuple, list):
        return type(x)(_cast(each, kinds) for each in x)
    if type(x) is dict:
        return {key: _cast(each, kinds) for key, each in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_cast(each, kinds) for each in x))
    kind = kinds.get(getattr(x, "dtype", None))
    return x if kind is None else x.to(kind)
