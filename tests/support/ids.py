"""Names of tests' parameters, the same in every process that collects the tests."""


def shown(value):
    """Return what a parameter is: of functions and classes their names, for their addresses differ."""
    return getattr(value, "__name__", repr(value))
