"""Endpoint addresses: conformance 3.9, character by character (WEP-11 to WEP-14, T-28)."""

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spiffe_wire.endpoint import EndpointError, TcpEndpoint, UnixEndpoint, parse_endpoint

patient = hypothesis_settings(deadline=None)  # the machine may be busy

UNIX = "unix:///run/x/agent.sock"
TCP = "tcp://127.0.0.1:8000"

ACCEPTED = {
    UNIX: UnixEndpoint("/run/x/agent.sock"),
    "unix:/run/x/agent.sock": UnixEndpoint("/run/x/agent.sock"),
    "unix:///a": UnixEndpoint("/a"),
    "unix:/a": UnixEndpoint("/a"),
    TCP: TcpEndpoint("127.0.0.1", 8000),
    "tcp://[::1]:8000": TcpEndpoint("::1", 8000),
    "tcp://[2001:DB8::1]:1": TcpEndpoint("2001:db8::1", 1),
    "tcp://127.0.0.1:65535": TcpEndpoint("127.0.0.1", 65535),
}
REFUSED = [
    "", " ", "unix:", "unix:/", "unix://", "unix:///", "unix:run/agent.sock", "unix:./a",
    "unix://run/agent.sock", "unix://localhost/run/a.sock", "unix://u@/run/a.sock",
    f"{UNIX}?x", f"{UNIX}?", f"{UNIX}#x", f"{UNIX}#", "unix:///run/a.sock/", "unix:/run/",
    "tcp://localhost:8000", "tcp://broker.example.com:8443", "tcp://127.0.0.1",
    "tcp://127.0.0.1:", "tcp://127.0.0.1:0", "tcp://127.0.0.1:65536", "tcp://127.0.0.1:99999",
    "tcp://127.0.0.1:-1", "tcp://127.0.0.1:+1", "tcp://127.0.0.1:8_0", "tcp://127.0.0.1:٨",
    f"{TCP}/", f"{TCP}/foo", f"{TCP}?x", f"{TCP}?", f"{TCP}#x", f"{TCP}#",
    "tcp://u@127.0.0.1:8000", "tcp://@127.0.0.1:8000", "tcp://u:p@127.0.0.1:8000",
    "tcp:127.0.0.1:8000", "tcp:/127.0.0.1:8000", "tcp://::1:8000", "tcp://[::1]", "tcp://[]:80",
    "tcp://127.1:80", "tcp://127.0.0.1.:80", "tcp://0x7f.0.0.1:80", "tcp://2130706433:80",
    "tcp://[127.0.0.1]:80", "tcp://127.0.0.01:80", "tcp://256.0.0.1:80", "tcp://[::1%eth0]:80",
    "tcp://[fe80::1%25eth0]:80", "tcp://[::1:80", "tcp://::1]:80",
    "/run/agent.sock", "run/agent.sock", "http://127.0.0.1:80", "npipe:spire", "unix",
    "UNIX:///run/a.sock", "Unix:/run/a.sock", "TCP://127.0.0.1:80", "//run/a.sock",
    "udp://127.0.0.1:80", "unixs:///run/a.sock", "xunix:///run/a.sock",
]  # fmt: skip


@pytest.mark.parametrize("text", ACCEPTED)
def test_wep_12_accepted(text: str) -> None:
    """WEP-12, WEP-13, WEP-14: both forms of `unix`, and `tcp` with IP address and port."""
    found = parse_endpoint(text)
    assert found == ACCEPTED[text]
    assert parse_endpoint(str(found)) == found


@pytest.mark.parametrize("text", REFUSED, ids=repr)
def test_wep_12_refused(text: str) -> None:
    """WEP-12, WEP-13, WEP-14: anything else is refused, and the text shows the two forms."""
    with pytest.raises(EndpointError, match=r"unix:///absolute/path or tcp://ip-address:port"):
        parse_endpoint(text)


@pytest.mark.parametrize("text", [UNIX, "unix:/run/a.sock", TCP, "tcp://[::1]:8000"])
def test_wep_12_every_foreign_character_in_every_place(text: str) -> None:
    """WEP-12: a blank, a control character or one outside ASCII is refused anywhere."""
    for code in (*range(33), 127, 0x80, 0x85, 0xA0, 0x2028, 0xFEFF, 0xFF0F):
        for at in range(len(text) + 1):
            with pytest.raises(EndpointError):
                parse_endpoint(text[:at] + chr(code) + text[at:])


@patient
@given(st.text(max_size=40))
def test_any_text_is_an_endpoint_or_an_error(text: str) -> None:
    """Whatever it is, it is parsed and prints back as what it means, or it is refused."""
    for one in (text, f"unix:{text}", f"unix://{text}", f"tcp://{text}"):
        try:
            found = parse_endpoint(one)
        except EndpointError:
            continue
        assert parse_endpoint(str(found)) == found


@patient
@given(st.from_regex(r"/[!$&-.0-;=@-~]{1,60}", fullmatch=True))
def test_wep_13_any_absolute_path(path: str) -> None:
    """WEP-13: an absolute path is taken as it stands; nothing in it is decoded or shortened."""
    if path.endswith("/") or path.startswith("//"):
        return
    assert (
        parse_endpoint(f"unix://{path}") == parse_endpoint(f"unix:{path}") == UnixEndpoint(path)
    )


@patient
@given(st.ip_addresses(), st.integers(1, 65535))
def test_wep_14_any_address(address: object, port: int) -> None:
    """WEP-14: any IP address with any port is an endpoint."""
    text = str(address)
    host = f"[{text}]" if ":" in text else text
    assert parse_endpoint(f"tcp://{host}:{port}") == TcpEndpoint(text, port)
