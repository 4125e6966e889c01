"""A device of torch's that is made of Python: it computes in host memory, of which its tensors tell nothing.

For a process of its own, as torch has one such device at most, and for contiguous tensors.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")
_memory = {}  # of each tensor on the device, by its storage: torch may make others of the tensor


def there(host):
    """Return a tensor on the device, of this memory."""
    tensor = torch._C._acc.create_empty_tensor(host.shape, host.dtype)
    _memory[tensor.untyped_storage()._cdata] = host
    return tensor


def host_of(tensor):
    """Return the memory of a tensor."""
    return _memory[tensor.untyped_storage()._cdata] if is_there(tensor) else tensor


def is_there(x):
    """Tell whether something is a tensor on the device."""
    return isinstance(x, torch.Tensor) and x.device.type == "elsewhere"


def _on_host(operation, *arguments, **keywords):
    """Carry an operation out in host memory; what it returns is on the device."""
    given = {}

    def on_host(x):
        if is_there(x):
            given[id(host_of(x))] = x
            return host_of(x)
        return torch.device("cpu") if isinstance(x, torch.device) else x

    def back(x):
        if not isinstance(x, torch.Tensor):
            return x
        return given[id(x)] if id(x) in given else there(x)

    arguments, keywords = pytree.tree_map(on_host, (arguments, keywords))
    needed = zip(arguments, operation._schema.arguments, strict=False)
    arguments = [  # numbers come unwrapped
        torch.tensor(x) if str(each.type) == "Tensor" and isinstance(x, int | float) else x
        for x, each in needed
    ]
    with torch.inference_mode(False), torch.no_grad():
        made = operation(*arguments, **keywords)
    # a view is an inference tensor where that is which it is of
    inferring = torch.is_inference_mode_enabled() and all(x.is_inference() for x in given.values())
    with torch.inference_mode(inferring):
        return pytree.tree_map(back, made)


def _copy_from(source, target, non_blocking=False):  # noqa: ARG001 - as torch calls it
    host_of(target).copy_(host_of(source))
    return target


_ANY, _ATEN = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_ANY.fallback(_on_host, "PrivateUse1")
_ATEN.impl("_copy_from", _copy_from, "PrivateUse1")
_VIEWED = torch.ops.aten.view.dtype
_ATEN.impl("view.dtype", lambda *x, **more: _on_host(_VIEWED, *x, **more), "PrivateUse1")
