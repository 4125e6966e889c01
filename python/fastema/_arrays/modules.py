"""Torch's modules: what they hold, by the names of the plain model, whatever wraps it."""

from collections.abc import Iterator
from copy import deepcopy
from sys import modules
from typing import Any, NamedTuple

from .._types import AnyArray
from .base import is_loaded

FSDP1 = "must lie where it is, and FullyShardedDataParallel keeps pieces of it: use fully_shard"
RESHARD = ", as those of the outermost module after a forward pass: call its reshard() first"


class Members(NamedTuple):
    """What a module holds, by the names that its state dict has without those of wrappers.

    Attributes:
        parameters: Its parameters; one that is there under two names (tied weights) under both.
        buffers: The buffers that its checkpoints hold.
        containers: The dictionaries that hold them and the modules within. None: it has others.
        buffers_of: Of each part its buffers, and the names of those that no checkpoint holds.
    """

    parameters: dict[str, AnyArray]
    buffers: dict[str, AnyArray]
    containers: list[dict[Any, Any] | list[Any]] | None
    buffers_of: list[tuple[dict[str, AnyArray], set[str]]]


_WRAPPERS = {  # where their classes are, and what they call the module within
    "OptimizedModule": ("torch._dynamo.eval_frame", "_orig_mod"),
    "DistributedDataParallel": ("torch.nn.parallel", "module"),
    "DataParallel": ("torch.nn.parallel", "module"),
    "ActivationWrapper": (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "_checkpoint_wrapped_module",
    ),
    "DeepSpeedEngine": ("deepspeed", "module"),
}


def unwrapped(module: AnyArray) -> AnyArray:
    """Return what wrappers of torch.compile, DDP and activation checkpointing hold; another module itself."""
    inner = _inner_name(module)
    while inner is not None:
        module = getattr(module, inner)
        inner = _inner_name(module)
    return module


def copied_state(module: AnyArray) -> dict[str, Any]:
    """Return a copy of a module's state dict, without what wrappers around it add to its names.

    What shares memory in it does so in the copy.
    """
    state: dict[str, Any] = deepcopy(unwrapped(module).state_dict())
    return state


def _inner_name(module: AnyArray) -> str | None:
    for kind, (place, inner) in _WRAPPERS.items():
        if is_loaded(module, place, kind):
            return inner
    return None


def members_of(module: AnyArray, *, buffers: bool) -> Members:
    """Return the parameters and buffers of a module, or of anything else with ``named_parameters()``.

    Args:
        module: What to look at.
        buffers: Whether buffers are wanted.

    Raises:
        RuntimeError: FSDP shows gathered parameters, which are copies that it throws away.
        TypeError: It is, or holds, a FullyShardedDataParallel.
    """
    check_sharded(module)
    if not is_loaded(module, "torch.nn", "Module") or _names_its_own(unwrapped(module)):
        return Members(dict(module.named_parameters()), _buffers_of(module) if buffers else {}, None, [])
    parameters: dict[str, AnyArray] = {}
    persistent: dict[str, AnyArray] = {}
    containers: list[dict[Any, Any] | list[Any]] | None = []
    buffers_of: list[tuple[dict[str, AnyArray], set[str]]] = []
    for name, part in _parts(module, "", ()):
        if is_loaded(part, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            raise TypeError(f"values[{name!r}] {FSDP1}")
        held = [part._parameters, part._modules, *([part._buffers] if buffers else [])]
        if containers is not None and all(isinstance(one, dict) for one in held):
            containers += held
        else:
            containers = None
        prefix = f"{name}." if name else ""
        for key, parameter in part._parameters.items():
            if parameter is not None:
                parameters[prefix + key] = parameter
        if buffers:
            hidden = part._non_persistent_buffers_set
            buffers_of.append((part._buffers, hidden))
            for key, buffer in part._buffers.items():
                if buffer is not None and key not in hidden:
                    persistent[prefix + key] = buffer
    return Members(parameters, persistent, containers, buffers_of)


def _names_its_own(module: AnyArray) -> bool:
    import torch  # noqa: PLC0415

    return type(module).named_parameters is not torch.nn.Module.named_parameters


def _parts(module: AnyArray, name: str, above: tuple[AnyArray, ...]) -> Iterator[tuple[str, AnyArray]]:
    """Yield a module and those within, under each name that they have, without those of wrappers."""
    if any(module is other for other in above):
        return
    yield name, module
    inner = _inner_name(module)
    for key, part in module._modules.items():
        if part is not None:
            below = name if key == inner else f"{name}.{key}" if name else key
            yield from _parts(part, below, (*above, module))


def _buffers_of(module: AnyArray) -> dict[str, AnyArray]:
    found: dict[str, AnyArray] = {}
    for name, part in module.named_modules() if hasattr(module, "named_modules") else ():
        for key, buffer in getattr(part, "_buffers", {}).items():
            if buffer is not None and key not in getattr(part, "_non_persistent_buffers_set", ()):
                found[f"{name}.{key}" if name else key] = buffer
    return found


def check_sharded(module: AnyArray) -> None:
    """Raise where FSDP shows gathered parameters of a module, which are copies that it throws away.

    Raises:
        RuntimeError: It does.
    """
    if "torch.distributed.fsdp" not in modules or not hasattr(module, "named_modules"):
        return
    for name, part in module.named_modules():
        if not is_loaded(part, "torch.distributed.fsdp", "FSDPModule"):
            continue
        if not all(group.is_sharded for group in groups_of(part)):
            raise RuntimeError(
                f"the parameters of module {name!r} must be sharded, and FSDP holds them gathered{RESHARD}"
            )


def groups_of(module: AnyArray) -> list[AnyArray]:
    """Return the groups of parameters that one module of FSDP gathers together."""
    state = module._get_fsdp_state()
    several = hasattr(state, "_fsdp_param_groups")  # as in torch 2.13
    groups = state._fsdp_param_groups if several else [state._fsdp_param_group]
    return [group for group in groups if group is not None]
