"""
Addresses of a Workload Endpoint, as in ``SPIFFE_ENDPOINT_SOCKET``.

Source: WEP-11 to WEP-14, conformance 3.9, T-28: ``urlsplit`` strips and hides too much, so
the two forms are matched as a whole.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, TypeAlias

from spiffe_core.errors import MalformedError

ENVIRONMENT_VARIABLE: Final = "SPIFFE_ENDPOINT_SOCKET"
# An empty authority or none: in unix://run/a.sock the authority is "run".
_UNIX = re.compile(r"unix:(?://)?(/(?!/)[^?#\s\x00-\x1f\x7f]*[^/?#\s\x00-\x1f\x7f])")
_TCP = re.compile(r"tcp://(?:\[([0-9a-fA-F]*:[0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})")


class EndpointError(MalformedError):
    """An address is not one a Workload Endpoint can have."""


@dataclass(frozen=True, slots=True)
class UnixEndpoint:
    """A Unix socket at an absolute path."""

    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True, slots=True)
class TcpEndpoint:
    """An IP address and port."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


Endpoint: TypeAlias = UnixEndpoint | TcpEndpoint


def parse_endpoint(text: str) -> Endpoint:
    """
    Parse ``unix:///path`` or ``tcp://ip:port``.

    Raises:
        EndpointError: anything else, with the two forms in its text.
    """
    if not text.isascii():
        raise EndpointError(_EXPECTED)
    if (unix := _UNIX.fullmatch(text)) is not None:
        return UnixEndpoint(unix[1])
    tcp = _TCP.fullmatch(text)
    if tcp is None:
        raise EndpointError(_EXPECTED)
    try:
        host = str(ipaddress.ip_address(tcp[1] or tcp[2]))
    except ValueError as error:
        raise EndpointError(_EXPECTED) from error
    port = int(tcp[3])
    if not 1 <= port <= 65535:
        raise EndpointError(_EXPECTED)
    return TcpEndpoint(host, port)


_EXPECTED = "an endpoint reads unix:///absolute/path or tcp://ip-address:port"
