"""One family of errors."""

import importlib
import inspect
import pkgutil

import pytest

import spiffe_core
from spiffe_core.errors import ErrorKind, SpiffeError

MODULES = [
    importlib.import_module(f"spiffe_core.{one.name}")
    for one in pkgutil.iter_modules(spiffe_core.__path__)
]
ERRORS = sorted(
    {
        one
        for module in MODULES
        for _, one in inspect.getmembers(module, inspect.isclass)
        if issubclass(one, Exception) and one.__module__.startswith("spiffe_core.")
    },
    key=lambda one: one.__qualname__,
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_of_the_family(error: type[Exception]) -> None:
    """Every error class of the core is a SpiffeError with a kind and a docstring."""
    assert issubclass(error, SpiffeError)
    assert isinstance(error.kind, ErrorKind)
    assert inspect.getdoc(error)
    assert error.__name__.endswith("Error")


def test_every_kind_can_be_raised() -> None:
    """No kind exists that no error has."""
    assert {error.kind for error in ERRORS if issubclass(error, SpiffeError)} == set(ErrorKind)


def test_an_error_without_a_kind_is_our_own_fault() -> None:
    """The base is INTERNAL: who forgets the kind blames nobody else."""
    assert SpiffeError("x").kind is ErrorKind.INTERNAL
