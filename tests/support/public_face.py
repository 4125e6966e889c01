"""The public face of fastema as text: a line for each name, with its signature, in sections.

    python tests/support/public_face.py > tests/data/public_face.txt

Types are left out: they may be said better without any caller noticing. What a class overrides counts as its
own, what it only inherits from another library does not.
"""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
from unittest import mock

MODULES = {  # module -> what must be installed for it
    "fastema": None,
    "fastema.checkpoint": None,
    "fastema.posthoc": None,
    "fastema.schedules": None,
    "fastema.cuda": None,
    "fastema.methods": None,
    "fastema.jax": "jax",
    "fastema.keras": "keras",
    "fastema.lightning": "torch",
    "fastema.tensorflow": "tensorflow",
    "fastema.transformers": "transformers",
}
TF_KERAS = "fastema.keras around optimizers of tf_keras"
COMMANDS = "python -m fastema"
NEEDED = {**MODULES, TF_KERAS: "tf_keras", COMMANDS: None}  # section -> what must be installed for it
SPECIAL = {"__call__", "__contains__", "__enter__", "__exit__", "__getitem__", "__iter__", "__len__"}


def section(name):
    """Return the lines of a section."""
    if name == COMMANDS:
        return list(_of_commands())
    if name == TF_KERAS:
        return list(_of_tf_keras())
    module = importlib.import_module(name)
    lines = [line for public in sorted(module.__all__) for line in _of_name(module, public)]
    if name == "fastema":
        lines += [f"build_config()[{key!r}]" for key in module.build_config()]
    return lines


def _of_name(module, name):
    public = getattr(module, name)
    if inspect.ismodule(public):
        yield f"{name}: a module"
    elif inspect.isclass(public):
        yield from _of_class(name, public)
    elif inspect.isroutine(public):
        yield name + _signature(public)
    else:
        yield name


def _of_class(name, cls):
    """Yield a line for the class and one for each of the members that fastema wrote."""
    yield name + (_signature(cls.__init__, bound=True) if _ours(cls, "__init__") else "()")
    names = {member for base in cls.__mro__ if _is_ours(base) for member in vars(base)}
    if dataclasses.is_dataclass(cls):
        names |= {field.name for field in dataclasses.fields(cls)}
    for member in sorted(names):
        if not member.startswith("_") or member in SPECIAL:
            yield f"{name}.{member}{_of_member(cls, member)}"


def _of_member(cls, name):
    member = inspect.getattr_static(cls, name, None)
    if isinstance(member, classmethod | staticmethod):
        return _signature(getattr(cls, name))
    if isinstance(member, property):
        return ": can be set" if member.fset else ": read-only"
    return _signature(member, bound=True) if callable(member) else ""


def _signature(function, *, bound=False):
    """Return the names, kinds and defaults of the arguments, `self` left out where it is bound."""
    signature = inspect.signature(function)
    arguments = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(inspect.Signature(arguments[bound:]))


def _is_ours(cls):
    return cls.__module__.partition(".")[0] == "fastema"


def _ours(cls, name):
    return any(name in vars(base) for base in cls.__mro__ if _is_ours(base))


def _of_tf_keras():
    import tf_keras

    from fastema.keras import ExponentialMovingAverage

    for inner in (tf_keras.optimizers.legacy.SGD(), tf_keras.optimizers.SGD()):
        kind = "legacy" if isinstance(inner, tf_keras.optimizers.legacy.Optimizer) else "new"
        yield from _of_class(f"{kind}: ExponentialMovingAverage", type(ExponentialMovingAverage(inner)))


def _of_commands():
    from fastema import __main__ as command

    class Reached(Exception):  # noqa: N818 - no error: the parser is complete
        pass

    parsers = []

    def reach(parser, *_):
        parsers.append(parser)
        raise Reached

    with mock.patch.object(argparse.ArgumentParser, "parse_args", reach), contextlib.suppress(Reached):
        command.main([])
    (commands,) = (action for action in parsers[0]._actions if isinstance(action.choices, dict))
    for name, parser in sorted(commands.choices.items()):
        yield name
        for action in parser._actions[1:]:  # without --help
            said = {
                "one of": action.choices and ", ".join(action.choices),
                "how many": action.nargs if action.option_strings and action.nargs != 0 else None,
                "default": action.default,
            }
            details = "; ".join(f"{key} {value}" for key, value in said.items() if value is not None)
            what = ", ".join(action.option_strings) or f"{action.dest} {action.nargs}"
            required = ", required" if action.required and action.option_strings else ""
            yield f"{name} {what}{required}{': ' + details if details else ''}"


def read(text):
    """Return section -> lines of the whole text."""
    sections, lines = {}, []
    for line in text.splitlines():
        if line.startswith("["):
            lines = sections[line.strip("[]")] = []
        elif line:
            lines.append(line)
    return sections


if __name__ == "__main__":
    print("\n\n".join("\n".join([f"[{name}]", *section(name)]) for name in NEEDED))
