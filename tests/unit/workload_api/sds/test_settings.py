"""Settings of SDS, and which of them are refused together."""

from pathlib import Path
from typing import Any

import pytest

from spiffe_wire.settings import SettingsError, load, unsafe_in_use
from workload_api.agent.config import ROLE, AgentSettings

FOLDER = "/run/spiffe-issuer/workload"


def settings(**sds: Any) -> AgentSettings:
    """Settings with these in their section ``sds``, by way of the environment."""
    words = {
        f"SPIFFE_ISSUER_AGENT_SDS__{key.upper()}": str(value).lower()
        if isinstance(value, bool)
        else value
        for key, value in sds.items()
    }
    return load(AgentSettings, "trust_domain: example.org", words, ROLE)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Path(FOLDER) / "sds.sock"),
        ({"socket": "envoy.sock"}, Path(FOLDER) / "envoy.sock"),
        ({"socket": "/run/envoy/sds.sock"}, Path("/run/envoy/sds.sock")),
        ({"socket": ""}, None),
    ],
    ids=["default", "name", "path", "off"],
)
def test_the_socket(given: dict[str, str], expected: Path | None) -> None:
    """Envoys have a socket beside the workload socket, elsewhere, or none."""
    assert settings(**given).sds_socket == expected


@pytest.mark.parametrize(
    ("given", "is_on"),
    [({}, True), ({"socket": ""}, False), ({"socket": "", "on_workload_socket": True}, True)],
    ids=["default", "off", "on the workload socket alone"],
)
def test_whether_it_is_on(given: dict[str, Any], is_on: bool) -> None:
    """SDS is on when it is served anywhere."""
    assert settings(**given).sds.is_on is is_on


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"socket": "envoys/sds.sock"}, r"sds\.socket: must be an absolute path"),
        ({"socket": f"{FOLDER}/workload.sock"}, r"sds\.socket: is the workload socket"),
        ({"socket": "workload.sock"}, r"sds\.socket: is the workload socket"),
        ({"socket": "/run/spiffe-issuer/agent/sds.sock"}, r"sds\.socket: must not lie in the"),
        ({"default_svid_name": ""}, r"sds\.default_svid_name: must be a word"),
        ({"default_bundle_name": "spiffe://a"}, r"sds\.default_bundle_name: must be a word"),
        ({"default_bundle_name": "ALL"}, r"sds\.default_bundle_name: two of the three"),
        ({"unsafe_without_header": True}, r"sds\.unsafe_without_header: is about"),
        ({"refuse_unknown_names": "maybe"}, r"sds\.refuse_unknown_names: must be true"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    """What cannot be, or would be a surprise, stops the agent with the key's path."""
    with pytest.raises(SettingsError, match=message):
        settings(**given)


def test_a_waived_header_is_named_unsafe() -> None:
    """SEC-38: the setting that waives the header is one of those that each start warns of."""
    waived = settings(on_workload_socket=True, unsafe_without_header=True)
    assert unsafe_in_use(waived) == ["sds.unsafe_without_header"]
    assert unsafe_in_use(settings(on_workload_socket=True)) == []
