"""Settings that cannot work together are refused with the key's path."""

import pytest

from issuer.config import ServerSettings
from spiffe_wire.settings import SettingsError, load

ROLE = "server"


def settings(text: str) -> ServerSettings:
    """Load *text* beside a trust domain."""
    return load(ServerSettings, f"trust_domain: example.org\n{text}", {}, ROLE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("svids: {jwt_max_ttl: 61m}", "svids.jwt_max_ttl: must be at most 1h"),
        ("svids: {jwt_ttl: 30m, jwt_max_ttl: 10m}", "svids: JWT-SVID lifetime"),
        ("svids: {x509_ttl: 2h, x509_max_ttl: 1h}", "svids: X.509-SVID lifetime"),
        ("svids: {x509_ttl: 0s}", "svids: X.509-SVID lifetime"),
        ("svids: {backdate: 6m}", "svids: backdate must be 0 to 5 minutes"),
        ("svids: {agent_ttl: 9s}", "svids.agent_ttl: must be at least 10s"),
        ("authority: {jwt_ttl: 0s}", "authority.jwt_ttl: must be above 0"),
        ("authority: {x509_ttl: 1h}", "authority.x509_ttl: must be at least twice"),
        ("authority: {publish_ahead: 300h}", "authority.publish_ahead: must be above 0"),
        ("authority: {publish_ahead: 0s}", "authority.publish_ahead: must be above 0"),
        ("bind_port: 65536", "bind_port: must be 0 to 65535"),
        ("admin_ids: [spiffe://partner.test/a]", "admin_ids: "),
        ("admin_ids: [spiffe://example.org]", "admin_ids: "),
        ("log_level: loud", "log_level: must be one of"),
    ],
)
def test_sec_95_what_cannot_be(text: str, says: str) -> None:
    """SEC-95, SEC-16, SEC-26: an impossible value stops the process, and its path is named."""
    with pytest.raises(SettingsError) as refused:
        settings(text)
    assert str(refused.value).startswith(says)


def test_the_defaults_are_possible() -> None:
    """A trust domain's name is all that must be said."""
    assert settings("").x509_profile.max_ttl.total_seconds() == 24 * 3600
