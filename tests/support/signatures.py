"""Stand-ins for packages that need a GPU, with the packages' signatures (tests/data/signatures.py)."""

import functools
import inspect
import json

from tests.support.paths import DATA

KNOWN = json.loads((DATA / "signatures.json").read_text())


def versions_of(*packages):
    """Return (package, version) of all known versions."""
    return [(package, version) for package in packages for version in KNOWN.get(package, {})]


def as_published(signatures, name, stand_in):
    """Wrap the function or class `stand_in` in the published signature of `name`, which names its arguments.

    Raises TypeError for an argument that the package does not accept.
    """
    if inspect.isclass(stand_in):
        methods = {"__init__": name, "forward": f"{name}.forward"}
        held = {
            method: _held(signatures[of], getattr(stand_in, method), 1)
            for method, of in methods.items()
            if of in signatures
        }
        return type(stand_in.__name__, (stand_in,), held)
    return _held(signatures[name], stand_in, 0)


def _held(parameters, function, num_bound):
    signature = inspect.signature(eval(f"lambda {parameters}: None"))

    @functools.wraps(function)
    def held(*arguments, **options):
        bound = signature.bind(*arguments[num_bound:], **options)
        return function(*arguments[:num_bound], **bound.arguments)

    return held
