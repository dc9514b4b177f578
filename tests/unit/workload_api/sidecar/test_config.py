"""The sidecar's settings: what is refused, with the path of the key, and what an example is."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from spiffe_wire.settings import SettingsError, example, load, rows
from workload_api.sidecar.config import ROLE, SidecarSettings
from workload_api.sidecar.files import Owner

RIGHT: dict[str, Any] = {"dir": "/run/svids", "x509": [{"name": "svid"}]}


def loaded(**changes: Any) -> SidecarSettings:
    """Right settings, but for *changes*."""
    return load(SidecarSettings, yaml.safe_dump({**RIGHT, **changes}), {}, ROLE)


def test_the_least() -> None:
    """A folder and an SVID will do, and every default is a safe one."""
    settings = loaded()
    modes = settings.files.modes()
    assert (modes.key, modes.jwt, modes.certificate, modes.bundle) == (
        0o600, 0o600, 0o644, 0o644,
    )  # fmt: skip
    assert settings.files.owner_ids() == Owner()
    assert settings.bundles.unsafe_merged_file == ""
    assert settings.settle == timedelta(seconds=1)
    assert settings.status.host == "127.0.0.1"


def test_the_example() -> None:
    """What ``--example`` prints can be loaded, and names every setting."""
    text = example(SidecarSettings, {"dir": "/run/svids"})
    assert load(SidecarSettings, text, {}, ROLE).dir == Path("/run/svids")
    for row in rows(SidecarSettings):
        assert f"{row.path.rpartition('.')[2].removesuffix('[]')}:" in text


def test_the_environment() -> None:
    """A variable overrides a key, as in the agent's settings."""
    variables = {"SPIFFE_ISSUER_SIDECAR_FILES__KEY_MODE": "0640"}
    settings = load(SidecarSettings, yaml.safe_dump(RIGHT), variables, ROLE)
    assert settings.files.modes().key == 0o640


def test_owner_by_name_and_number() -> None:
    """An owner is a name of this machine, or a number."""
    files = loaded(files={"owner": "root", "group": "1234"}).files
    assert files.owner_ids() == Owner(0, 1234)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cert_dir": "/x"}, "cert_dir: no such setting"),
        ({"x509": [{"nme": "x"}]}, "x509[0].nme: no such setting"),
        ({"dir": "svids"}, "dir: must be an absolute path"),
        ({"endpoint": "/run/w.sock"}, "endpoint: an endpoint reads unix:///"),
        ({"x509": [], "bundles": {"x509": False}}, "x509: there is nothing to write"),
        ({"x509": [{"name": ""}]}, "x509[0].name: must not be empty"),
        ({"x509": [{"name": "../key"}]}, "x509[0].name: must be a name in `dir`"),
        ({"x509": [{"key_file": "a/b"}]}, "x509[0].key_file: must be a name in `dir`"),
        ({"x509": [{"spiffe_id": "x"}]}, "x509[0].spiffe_id: scheme"),
        (
            {"x509": [{"spiffe_id": "spiffe://a/b", "hint": "h"}]},
            "x509[0].hint: spiffe_id says which one already",
        ),
        ({"x509": [{"pem": False}]}, "x509[0].pem: nothing of this SVID would be written"),
        ({"x509": [{}, {}]}, "x509: two files would be called svid.pem"),
        ({"x509": [{"pkcs12": True}]}, "pkcs12_password_file: must be set"),
        ({"jwt": [{}]}, "jwt[0].audience: must be set"),
        ({"jwt": [{"audience": []}]}, "jwt[0].audience: must name who"),
        ({"jwt": [{"audience": [""]}]}, "jwt[0].audience: must name who"),
        ({"jwt": [{"audience": ["a"], "file": "svid.pem"}]}, "two files would be called"),
        ({"files": {"key_mode": 384}}, "files.key_mode: must be text"),
        ({"files": {"key_mode": "rw"}}, "files.key_mode: a mode reads"),
        ({"files": {"key_mode": "0644"}}, "files.key_mode: everybody could use it"),
        ({"files": {"jwt_mode": "0604"}}, "files.jwt_mode: everybody could use it"),
        ({"files": {"owner": "nobody-of-this-name"}}, "files.owner: there is no user"),
        ({"files": {"group": "nobody-of-this-name"}}, "files.group: there is no group"),
        ({"on_change": [{}]}, "on_change[0].signal: set one of"),
        (
            {"on_change": [{"url": "http://localhost/x", "command": ["x"]}]},
            "on_change[0].signal: set one of",
        ),
        ({"on_change": [{"signal": "HUP"}]}, "on_change[0]: there is no command of ours"),
        ({"on_change": [{"restart": True}]}, "on_change[0]: there is no command of ours"),
        ({"on_change": [{"signal": "HOP", "pid_file": "/p"}]}, "'HOP' is none"),
        ({"on_change": [{"command": ["x"], "pid_file": "/p"}]}, "on_change[0].pid_file: "),
        ({"on_change": [{"command": [""]}]}, "on_change[0].command: must begin with"),
        (
            {"on_change": [{"command": "nginx -s reload"}]},
            "on_change[0].command: must be a list",
        ),
        ({"on_change": [{"command": ["x"], "on": ["all"]}]}, "on_change[0].on: must hold"),
        ({"on_change": [{"command": ["x"], "on": []}]}, "on_change[0].on: must hold"),
        ({"on_change": [{"command": ["x"], "tries": 0}]}, "on_change[0].tries: "),
        ({"on_change": [{"command": ["x"], "timeout": "0s"}]}, "on_change[0].tries: "),
        ({"on_change": [{"url": "http://h/x"}]}, "on_change[0].url: h is not this machine"),
        ({"on_change": [{"url": "https://localhost/x"}]}, "on_change[0].url: reads http://"),
        ({"on_change": [{"url": "http://a:b@localhost/x"}]}, "on_change[0].url: reads http://"),
        ({"on_change": [{"url": "http://localhost:x/"}]}, "on_change[0].url: "),
        ({"on_change": [{"url": "http://[::1]/", "method": "X"}]}, "on_change[0].method: "),
        ({"command": [""]}, "command: must begin with a program"),
        ({"bundles": {"unsafe_merged_file": "a/b"}}, "bundles.unsafe_merged_file: must be"),
        ({"log_level": "loud"}, "log_level: must be one of"),
        ({"when_denied": "burn"}, "when_denied: must be one of keep, remove"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_is_refused(changes: dict[str, Any], why: str) -> None:
    """An unknown key or a value that cannot be stops the start, and its path is said."""
    with pytest.raises(SettingsError) as refused:
        loaded(**changes)
    assert why in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1:80", "localhost", "[::1]:8080"])
def test_this_machine_may_be_called(host: str) -> None:
    """An HTTP address on loopback needs no setting that is called unsafe."""
    assert loaded(on_change=[{"url": f"http://{host}/reload"}]).on_change[0].url
