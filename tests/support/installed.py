"""Classes of packages that are installed without what they depend on: each comes from its own file alone."""

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace


def timm_utils():
    """Return what we use of timm.utils; None where timm or torch is not installed."""
    return _definitions("timm", "utils/model_ema.py", ["ModelEmaV3", "_lerp_stochastic_round_bf16_"])


def diffusers_training_utils():
    """Return what we use of diffusers.training_utils; None where diffusers or torch is not installed."""
    return _definitions(
        "diffusers", "training_utils.py", ["EMAModel"], is_transformers_available=lambda: False
    )


def without_their_dependencies():
    """Return module name -> module, of what is installed."""
    found = {"timm.utils": timm_utils(), "diffusers.training_utils": diffusers_training_utils()}
    return {name: module for name, module in found.items() if module is not None}


def _definitions(package, file, names, **imports):
    spec = importlib.util.find_spec(package)
    if spec is None or importlib.util.find_spec("torch") is None:
        return None
    tree = ast.parse(Path(spec.origin).parent.joinpath(file).read_text(encoding="utf-8"))
    body = [
        node
        for node in tree.body
        if getattr(node, "name", None) in names
        or (isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0))
    ]
    namespace = {"__name__": package, **imports}
    exec(compile(ast.Module(body, []), file, "exec"), namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})
