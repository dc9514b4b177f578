"""
What TLS needs to know of who we are and whom we can verify: `X509Source`, or a stand-in.

Everything in this package that makes a connection takes an `X509Material` and asks it anew for
each one, so that a rotation needs nothing done.
"""

from collections.abc import Callable
from typing import Protocol

from spiffe_core.bundle import BundleSet
from workload_api.client.client import X509Identity


class X509Material(Protocol):
    """An X509-SVID with its key, and bundles by trust domain, both as they are now."""

    @property
    def identity(self) -> X509Identity:
        """
        Our own SVID and key; another object after every rotation.

        Raises:
            NotReadyError: there is none, or it has expired.
        """
        ...

    @property
    def bundles(self) -> BundleSet:
        """The bundles of every domain that we may talk to; another object when changed."""
        ...

    def on_change(self, told: Callable[[], None]) -> Callable[[], None]:
        """Have *told* called in the event loop after every change; return what ends that."""
        ...
