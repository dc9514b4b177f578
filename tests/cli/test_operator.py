"""What operators do beside entries: tokens, agents, bundles, minting, health."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import (
    DONE,
    REFUSED,
    UNREACHABLE,
    Programs,
    openssl_key_fits,
    openssl_verifies,
)
from tests.support.stack import ROOT, AgentProcess, Stack, a_folder, a_server

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_sec_90_a_token_is_printed_once(programs: Programs, stack: Stack) -> None:
    """SEC-90: the token is on the standard output of its command, and nowhere else at all."""
    text = await programs.issuer("token", "generate", "--ttl", "5m")
    assert text.code == DONE
    assert text.out.startswith("Token: ")
    assert text.err == ""
    token = text.out.removeprefix("Token: ").strip()
    assert len(token.partition(".")[2]) >= 43, "256 bits"

    as_json = await programs.issuer("token", "generate", "-o", "json")
    assert set(as_json.json) == {"value", "expires_at"}
    await programs.issuer("agent", "list", "-o", "json")
    files = [one.read_bytes() for one in stack.folder.rglob("*") if one.is_file()]
    assert any(b"server_ready" in one for one in files), "the log is among them"
    for each in (token, as_json.json["value"]):
        secret = each.partition(".")[2].encode()
        assert not any(secret in one for one in files)


async def test_a_token_lets_one_agent_join(programs: Programs, stack: Stack) -> None:
    """The printed token is what an agent joins with; then it is listed, with its alias."""
    alias = "spiffe://example.org/db-host"
    token = (await programs.issuer("token", "generate", "--spiffe-id", alias)).out[7:].strip()
    with a_folder() as folder:
        second = AgentProcess(folder, stack.server)
        try:
            await second.join()  # with a token of its own; its settings are what we need
            second.process.stop()
            for left in (folder / "agent").iterdir():
                left.unlink()
            (folder / "token").write_text(token)
            await second.start()
            listed = (await programs.issuer("agent", "list", "-o", "json")).json["agents"]
            paths = [one["id"]["path"] for one in listed]
            assert f"/spire/agent/join_token/{token.partition('.')[0]}" in paths
            entries = await programs.issuer("entry", "list", "--spiffe-id", alias)
            assert second.agent_id in entries.out
        finally:
            second.process.close()


async def test_agents_are_listed_and_shown(programs: Programs, stack: Stack) -> None:
    """An agent's row has its ID, how it attested, until when, and its version; -q the ID."""
    listed = await programs.issuer("agent", "list")
    assert listed.out.splitlines()[0].split() == [
        "SPIFFE", "ID", "TYPE", "SVID", "EXPIRES", "STATE", "VERSION",
    ]  # fmt: skip
    shown = await programs.issuer("agent", "show", "--spiffe-id", stack.agent.agent_id)
    row = shown.out.splitlines()[1].split()
    assert row[:2] == [stack.agent.agent_id, "join_token"]
    assert row[2:4] in (["in", "59m"], ["in", "60m"])
    assert row[4:] == ["attested", "0.1.0"]

    ids = await programs.issuer("agent", "list", "-q")
    assert stack.agent.agent_id in ids.out.splitlines()
    assert all(one.startswith("spiffe://") for one in ids.out.splitlines())
    quiet = await programs.issuer("agent", "list", "-q", "--type", "x509pop")
    assert (quiet.code, quiet.out) == (DONE, "")
    none = await programs.issuer("agent", "list", "--type", "x509pop")
    assert none.out == "no agent found: `issuer token generate` makes a token for one\n"
    count = await programs.issuer("agent", "count", "--banned", "-o", "json")
    assert count.json == {"count": 0}
    missing = await programs.issuer(
        "agent", "show", "--spiffe-id", "spiffe://example.org/spire/agent/x/y", "-o", "json"
    )
    assert (missing.code, missing.out) == (REFUSED, "")
    assert "`issuer agent list` shows who is there" in missing.err


async def test_sec_52_ban_and_evict(programs: Programs, stack: Stack) -> None:
    """SEC-52: a banned agent is denied at once and ends; evicted, it is gone."""
    with a_folder() as folder:
        other = AgentProcess(folder, stack.server)
        try:
            await other.join()
            banned = await programs.issuer("agent", "ban", "--spiffe-id", other.agent_id)
            assert banned.code == DONE
            assert await other.process.wait() == 1
            state = await programs.issuer("agent", "list", "--banned")
            assert other.agent_id in state.out
            assert " banned " in state.out
            gone = await programs.issuer(
                "agent", "evict", "--spiffe-id", other.agent_id, "-o", "yaml"
            )
            assert gone.yaml == {"evicted": other.agent_id}
            assert (await programs.issuer("agent", "list", "--banned")).out.startswith(
                "no agent"
            )
        finally:
            other.process.close()


async def test_our_bundle(programs: Programs, tmp_path: Path) -> None:
    """Our bundle as PEM that openssl reads, as a SPIFFE document, and as the message."""
    pem = await programs.issuer("bundle", "show")
    file = tmp_path / "bundle.pem"
    file.write_text(pem.out)
    ran = subprocess.run(
        ["openssl", "x509", "-in", file, "-noout", "-ext", "subjectAltName"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "URI:spiffe://example.org" in ran.stdout
    document = json.loads((await programs.issuer("bundle", "show", "-format", "spiffe")).out)
    assert {one["use"] for one in document["keys"]} == {"x509-svid", "jwt-svid"}
    assert document["spiffe_sequence"] >= 1
    message = (await programs.issuer("bundle", "show", "-o", "json")).json
    assert message["trust_domain"] == "example.org"
    assert len(message["x509_authorities"]) == pem.out.count("BEGIN CERTIFICATE")


async def test_foreign_bundles(programs: Programs) -> None:
    """A foreign bundle is set from a document on standard input, listed, used, deleted."""
    document = (await programs.issuer("bundle", "show", "--format", "spiffe")).out
    own = await programs.issuer(
        "bundle", "set", "--id", "example.org", "--format", "spiffe", stdin=document
    )
    assert own.code == REFUSED, "nobody replaces our own"
    before = (await programs.issuer("bundle", "list")).out
    assert before == "no foreign bundle: `issuer bundle set` adds one\n"

    async with a_server(trust_domain="other.org") as other:
        asked = Programs({"SPIFFE_ISSUER_SOCKET": str(other.admin_socket)})
        foreign = (await asked.issuer("bundle", "show", "--format", "spiffe")).out
    done = await programs.issuer(
        "bundle", "set", "--id", "spiffe://other.org", "--format", "spiffe", stdin=foreign
    )
    assert (done.code, done.out) == (DONE, "bundle of other.org set\n"), done.err
    listed = await programs.issuer("bundle", "list", "--format", "spiffe")
    head, _, body = listed.out.partition("\n")
    assert head == "# other.org"
    assert json.loads(body)["keys"] == json.loads(foreign)["keys"]
    assert (await programs.issuer("bundle", "count")).out == "2 bundles\n"

    await programs.issuer(
        "entry", "create", "--spiffe-id", "spiffe://example.org/fed", "--parent-id",
        "spiffe://example.org/spire/agent/x/y", "--selector", "unix:uid:1",
        "--federates-with", "other.org",
    )  # fmt: skip
    refused = await programs.issuer("bundle", "delete", "--id", "other.org", "-o", "json")
    assert refused.code == REFUSED
    assert refused.json["results"][0]["status"]["code"] != 0
    gone = await programs.issuer(
        "bundle", "delete", "--id", "other.org", "--mode", "dissociate"
    )
    assert (gone.code, gone.out) == (DONE, "bundle of other.org deleted\n")
    missing = await programs.issuer("bundle", "list", "--id", "other.org")
    assert missing.code == REFUSED
    assert "`issuer bundle list` shows which are there" in missing.err


async def test_mint_x509(programs: Programs, tmp_path: Path) -> None:
    """What mint writes is private where it must be, and openssl verifies it strictly."""
    folder = tmp_path / "minted"
    done = await programs.issuer(
        "x509", "mint", "--spiffe-id", "spiffe://example.org/by-hand", "--dns", "h.example.org",
        "--ttl", "10m", "--write", folder,
    )  # fmt: skip
    assert done.code == DONE
    assert done.out == f"wrote svid.pem, key.pem, bundle.pem to {folder}\n"
    modes = {one.name: oct(one.stat().st_mode & 0o777) for one in folder.iterdir()}
    assert modes["key.pem"] == "0o600"
    assert set(modes) == {"svid.pem", "key.pem", "bundle.pem"}
    openssl_verifies(folder / "bundle.pem", folder / "svid.pem")
    openssl_key_fits(folder / "key.pem", folder / "svid.pem")


async def test_mint_x509_to_standard_output(programs: Programs) -> None:
    """Without ``--write`` all three parts are in the answer, under SPIRE's names in JSON."""
    made = (await programs.issuer(
        "x509", "mint", "-spiffeID", "spiffe://example.org/by-hand", "-o", "json",
    )).json  # fmt: skip
    assert made["private_key"].startswith("-----BEGIN PRIVATE KEY-----")
    assert made["x509_svid"].count("BEGIN CERTIFICATE") == 1
    assert made["root_cas"].count("BEGIN CERTIFICATE") == 1
    refused = await programs.issuer("x509", "mint", "--spiffe-id", "spiffe://other.org/x")
    assert refused.code == REFUSED
    assert refused.out == ""
    capped = await programs.issuer(
        "jwt", "mint", "--spiffe-id", "spiffe://example.org/x", "--audience", "a",
        "--ttl", "100h",
    )  # fmt: skip
    assert capped.code == DONE
    assert "lives shorter than asked" in capped.err
    assert capped.out.count(".") == 2


async def test_healthcheck(programs: Programs) -> None:
    """SPIRE's words and code for a healthy server; unreachable is 3."""
    well = await programs.issuer("healthcheck")
    assert (well.code, well.out) == (DONE, "Server is healthy.\n")
    assert (await programs.issuer("healthcheck", "-o", "json")).json == {"healthy": True}
    gone = await programs.issuer("healthcheck", "--socket", "/nonexistent", "-o", "json")
    assert (gone.code, gone.out) == (UNREACHABLE, "")


async def test_output_to_a_closed_pipe(programs: Programs) -> None:
    """A reader that leaves early is no error: ``| head`` works, with no traceback."""
    line = "python -m issuer bundle show --format spiffe -o json | head -c 1"
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **programs.variables, "PATH": _path()},
    )  # fmt: skip
    assert (ran.stdout, ran.stderr, ran.returncode) == ("{", "", 0)


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


async def test_a_command_makes_no_connection_in_vain(programs: Programs, stack: Stack) -> None:
    """A health check that is asked every few seconds leaves nothing in the server's log."""
    before = stack.server.process.log.read_text().count("connection_refused")
    assert (await programs.issuer("healthcheck")).code == DONE
    assert (await programs.issuer("agent", "list")).code == DONE
    assert stack.server.process.log.read_text().count("connection_refused") == before
