"""``issuer-agent``: what a workload sees of itself, and what its operator asks the agent."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.programs import (
    DONE,
    REFUSED,
    UNREACHABLE,
    Programs,
    environment,
    openssl_key_fits,
    openssl_verifies,
    ran,
)
from tests.support.stack import ROOT, Stack, a_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")
ME = f"unix:uid:{os.geteuid()}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A stack in which this user's processes are ``/web``, or ``/web`` and ``/api``."""
    async with a_stack() as running:
        for path, hint in (("/web", ""), ("/api", "internal")):
            await running.server.add_entry(path, running.agent.agent_id, ME, hint=hint)
        await running.agent.until_svids(2)
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def programs(stack: Stack) -> Programs:
    """Both programs, in an environment that names the stack's sockets."""
    return Programs.of(stack)


@contextlib.asynccontextmanager
async def watching(programs: Programs) -> AsyncIterator[asyncio.subprocess.Process]:
    """``issuer-agent watch -o json``, running."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "workload_api.agent", "watch", "-o", "json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
        env=environment(programs.variables),
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def update_of(process: asyncio.subprocess.Process) -> Any:
    """The next line that it prints."""
    assert process.stdout is not None
    return json.loads(await asyncio.wait_for(process.stdout.readline(), 15))


async def test_fetch_x509(programs: Programs) -> None:
    """Text has each identity and when it ends; JSON and YAML say the same; no key in any."""
    text = await programs.agent("fetch", "x509")
    assert text.code == DONE
    lines = text.out.splitlines()
    assert lines[0] == "spiffe://example.org/web"
    assert "(in " in lines[2]
    assert "  hint      internal" in lines
    assert lines[-1] == "trusts example.org"
    as_json = await programs.agent("fetch", "x509", "-o", "json")
    svids = as_json.json["svids"]
    assert [(one["spiffe_id"], one["hint"]) for one in svids] == [
        ("spiffe://example.org/web", ""), ("spiffe://example.org/api", "internal"),
    ]  # fmt: skip
    assert set(svids[0]) == {
        "spiffe_id", "serial", "not_before", "not_after", "hint", "x509_svid",
    }  # fmt: skip
    assert (await programs.agent("fetch", "x509", "-o", "yaml")).yaml == as_json.json


def names_in(folder: Path) -> set[str]:
    """The names that people open in *folder*."""
    return {one.name for one in folder.iterdir() if not one.name.startswith(".")}


async def test_sec_11_what_is_written(programs: Programs, tmp_path: Path) -> None:
    """SEC-11: one bundle file a trust domain; keys are 0600; openssl verifies what is there."""
    folder, elsewhere = tmp_path / "svids", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.write_text("mine")
    (folder / "svid.0.key").symlink_to(elsewhere)
    (folder / "..new").symlink_to(elsewhere)
    done = await programs.agent("fetch", "x509", "--write", folder, "-o", "json")
    assert done.code == DONE
    names = {
        "svid.0.pem", "svid.0.key", "svid.1.pem", "svid.1.key", "bundle.example.org.pem",
    }  # fmt: skip
    assert names_in(folder) == names
    assert {Path(one).name for one in done.json["written"]} == names
    assert elsewhere.read_text() == "mine"
    for number in (0, 1):
        key, svid = folder / f"svid.{number}.key", folder / f"svid.{number}.pem"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        openssl_verifies(folder / "bundle.example.org.pem", svid)
        openssl_key_fits(key, svid)

    bundles = await programs.agent("fetch", "bundles", "--write", tmp_path / "b")
    assert bundles.out == f"wrote 2 files to {tmp_path}/b\n"
    same = (tmp_path / "b" / "bundle.example.org.pem").read_text()
    assert same == (folder / "bundle.example.org.pem").read_text()
    refused = await programs.agent("fetch", "x509", "--write", elsewhere / "x")
    assert refused.code == REFUSED
    assert refused.err.startswith(f"{elsewhere}/x cannot be opened: Not a directory; ")


async def test_one_folder_for_all_kinds(programs: Programs, tmp_path: Path) -> None:
    """Each fetch replaces the files of its own kind in a folder, and leaves the others."""
    folder = tmp_path / "svids"
    two = ("jwt", "--audience", "a/b", "--audience", "c")
    for words in (("x509",), ("jwt", "--audience", "db"), two, ("bundles",), ("x509",)):
        done = await programs.agent("fetch", *words, "--write", folder)
        assert (done.code, done.err) == (DONE, "")
    assert names_in(folder) == {
        "svid.0.pem", "svid.0.key", "svid.1.pem", "svid.1.key", "bundle.example.org.pem",
        "bundle.example.org.jwks.json", "jwt.0.db.token", "jwt.1.db.token",
        "jwt.0.a%2Fb+c.token", "jwt.1.a%2Fb+c.token",
    }  # fmt: skip
    token = folder / "jwt.1.db.token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    valid = await programs.agent("validate", "--audience", "db", token.read_text())
    assert valid.out == "valid: spiffe://example.org/api for db\n"
    (key,) = json.loads((folder / "bundle.example.org.jwks.json").read_text())["keys"]
    assert key["kty"] == "EC"
    assert "d" not in key


async def test_pkcs12(programs: Programs, tmp_path: Path) -> None:
    """PKCS#12 is sealed with a file's first line; openssl opens it with that, and no other."""
    folder, password = tmp_path / "p12", tmp_path / "password"
    password.write_text("correct horse\nsecond line\n")
    done = await programs.agent(
        "fetch", "x509", "--format", "pkcs12", "--password-file", password, "--write", folder
    )
    assert (done.code, done.err) == (DONE, "")
    assert names_in(folder) == {"svid.0.p12", "svid.1.p12", "bundle.example.org.p12"}
    sealed = folder / "svid.0.p12"
    assert stat.S_IMODE(sealed.stat().st_mode) == 0o600
    command = ("openssl", "pkcs12", "-in", sealed, "-nodes", "-passin")
    # openssl prints the key on standard output, which is what it was asked for.
    opened = await ran(*command, f"file:{password}")
    assert opened.code == 0
    assert "PRIVATE KEY" in opened.out
    assert "spiffe://example.org/web" in opened.out
    assert (await ran(*command, "pass:wrong")).code != 0


@pytest.mark.apt
@pytest.mark.skipif(shutil.which("keytool") is None, reason="there is no keytool (a JDK)")
async def test_java_reads_it(programs: Programs, tmp_path: Path) -> None:
    """keytool finds our key in one file, and a trusted authority in the other."""
    folder, password = tmp_path / "p12", tmp_path / "password"
    password.write_text("changeit\n")
    await programs.agent(
        "fetch", "x509", "--format", "pkcs12", "--password-file", password, "--write", folder
    )
    for name, entry in (
        ("svid.0.p12", r"spiffe://example\.org/web, .*, PrivateKeyEntry"),
        ("bundle.example.org.p12", r"example\.org-0, .*, trustedCertEntry"),
    ):
        listed = await ran(
            "keytool", "-list", "-keystore", folder / name, "-storepass", "changeit"
        )
        assert re.search(entry, listed.out), listed.out


async def test_bundles(programs: Programs) -> None:
    """How many authorities each trust domain has, and their IDs for programs."""
    text = await programs.agent("fetch", "bundles")
    assert text.out == "example.org: 1 X.509 and 1 JWT authorities\n"
    found = (await programs.agent("fetch", "bundles", "-o", "json")).json["example.org"]
    assert {name: len(ids) for name, ids in found.items()} == {
        "x509_authorities": 1, "jwt_authorities": 1,
    }  # fmt: skip


async def test_jwt_fetch_and_validate(programs: Programs) -> None:
    """A token is printed alone; it is valid for its audience, and for no other."""
    fetched = await programs.agent(
        "fetch", "jwt", "--audience", "db", "--spiffe-id", "spiffe://example.org/api"
    )
    (token,) = fetched.out.split()
    valid = await programs.agent("validate", "--audience", "db", token)
    assert (valid.code, valid.out) == (DONE, "valid: spiffe://example.org/api for db\n")
    claims = await programs.agent(
        "validate", "-audience", "db", "-", "-o", "json", stdin=f"{token}\n"
    )
    assert claims.json["spiffe_id"] == claims.json["claims"]["sub"]
    wrong = await programs.agent("validate", "--audience", "mail", token)
    assert (wrong.code, wrong.out) == (REFUSED, "")
    assert token not in wrong.err
    forged = await programs.agent("validate", "--audience", "db", token[:-4] + "AAAA")
    assert forged.code == REFUSED
    both = await programs.agent("fetch", "jwt", "--audience", "a", "--audience", "b", "-o",
                                "json")  # fmt: skip
    assert [one["audience"] for one in both.json["svids"]] == [["a", "b"], ["a", "b"]]


async def test_whoami(programs: Programs) -> None:
    """A process is told what is attested of it, and who it is."""
    facts = (await programs.agent("whoami", "-o", "json")).json
    assert facts["uid"] == os.geteuid()
    assert f"unix:path:{os.path.realpath(sys.executable)}" in facts["selectors"]
    assert facts["partial"] == {}
    assert facts["spiffe_ids"] == ["spiffe://example.org/web", "spiffe://example.org/api"]
    text = await programs.agent("whoami")
    assert f"  {ME}\n" in text.out
    assert text.out.endswith("spiffe://example.org/web\nspiffe://example.org/api\n")


async def test_wapi_08_watch_prints_each_change(programs: Programs, stack: Stack) -> None:
    """WAPI-08: the full state at once, and again when it changes."""
    async with watching(programs) as watcher:
        first = await update_of(watcher)
        renewed = await programs.agent("renew", "--spiffe-id", "spiffe://example.org/web")
        assert renewed.out == "1 renewed\n"
        second = await update_of(watcher)
        serials = [[one["serial"] for one in each["svids"]] for each in (first, second)]
        assert serials[0][0] != serials[1][0], "renewed"
        assert serials[0][1] == serials[1][1], "the other one as it was"


async def test_health_and_status(programs: Programs, stack: Stack) -> None:
    """SPIRE's words for a healthy agent; status names agent, sync and what it holds."""
    assert (await programs.agent("healthcheck")).out == "Agent is healthy.\n"
    assert (await programs.agent("healthcheck", "-o", "yaml")).yaml == {"healthy": True}
    text = await programs.agent("status")
    rows = dict(line.split(None, 1) for line in text.out.replace(" id", "_id").splitlines())
    assert rows["agent_id"] == stack.agent.agent_id
    facts = (await programs.agent("status", "-o", "json")).json
    assert (facts["x509_svids"], facts["connected"], facts["problem"]) == (2, True, "")


async def test_one_without_identity() -> None:
    """It is refused with code 1 and told whom to ask; with one, it watches until the end: 3."""
    async with a_stack(agent_changes={"workloads": {"no_identity_grace": "10ms"}}) as empty:
        programs = Programs.of(empty)
        asked = (("fetch", "x509"), ("fetch", "jwt", "--audience", "a"), ("watch",))
        for answer in await asyncio.gather(
            *(programs.agent(*command, "-o", "json") for command in asked)
        ):
            assert answer.code == REFUSED
            assert "`issuer explain --pid " in answer.err
            assert answer.out == ""
        whoami = await programs.agent("whoami")
        assert whoami.code == DONE
        assert "no identity: the operator can ask why" in whoami.out

        await empty.server.add_entry("/late", empty.agent.agent_id, ME)
        async with watching(programs) as watcher:
            assert (await update_of(watcher))["svids"][0]["spiffe_id"].endswith("/late")
            empty.agent.process.kill()
            assert await asyncio.wait_for(watcher.wait(), 15) == UNREACHABLE


async def test_an_agent_that_is_not_ready() -> None:
    """It answers, so it is not unreachable: the code is 1, with what it lacks."""
    async with a_stack() as alone:
        alone.server.process.kill()
        alone.agent.process.stop()
        shutil.rmtree(alone.folder / "agent")  # what it could serve from
        await alone.agent.start(connected=False)
        programs = Programs.of(alone)
        health = await programs.agent("healthcheck", "-o", "json")
        assert (health.code, health.json) == (REFUSED, {"healthy": False})
        assert "`issuer-agent status` says why" in health.err
        fetched = await programs.agent("fetch", "x509")
        assert fetched.code == REFUSED
        assert fetched.err == "the agent has not heard from its server yet\n"
        explained = await programs.issuer("explain", "--pid", str(os.getpid()))
        assert explained.code == REFUSED
        assert "the agent has not heard from its server yet" in explained.out
        doctor = await programs.issuer("doctor", "-o", "json")
        found = {one["what"]: one["verdict"] for one in doctor.json["findings"]}
        assert (doctor.code, found["server"], found["agent"]) == (REFUSED, "warn", "bad")


async def test_the_endpoint(stack: Stack) -> None:
    """The address is an option or a variable, a URI or a plain path; one nobody serves is 3."""
    bare = Programs()
    plain = await bare.agent("fetch", "bundles", "--endpoint", str(stack.agent.workload_socket))
    spire = await bare.agent("fetch", "bundles", "-socketPath", stack.agent.endpoint)
    assert plain.out == spire.out != ""
    gone = await bare.agent("watch", "--endpoint", "unix:///nonexistent/s")
    assert gone.code == UNREACHABLE
    assert gone.err == "no agent answers at unix:///nonexistent/s: is it running?\n"


async def test_watch_ends_when_its_reader_does(programs: Programs) -> None:
    """``watch | head -1`` ends, with no traceback, at the update after its reader has left."""
    line = f"{sys.executable} -m workload_api.agent watch | head -1"
    piped = asyncio.create_task(ran("bash", "-c", line, env=programs.variables))
    for _ in range(100):
        await programs.agent("renew")
        if piped.done():
            break
    assert (await piped).out == "spiffe://example.org/web\n"


async def test_settings_of_the_agent(tmp_path: Path) -> None:
    """The example is valid, a mistake is refused with its path, and a missing file is named."""
    bare = Programs()
    example = tmp_path / "agent.yaml"
    example.write_text((await bare.agent("config", "example")).out)
    valid = await bare.agent("config", "validate", "-c", example)
    assert (valid.code, valid.out) == (DONE, f"{example} is valid\n")
    example.write_text("trust_domain: example.org\nserver: {addres: x}\n")
    wrong = await bare.agent("config", "validate", "-c", example, "-o", "json")
    assert (wrong.code, wrong.out) == (REFUSED, "")
    assert wrong.err.startswith("server.addres: no such setting")
    missing = await bare.agent("run", "-c", tmp_path / "none.yaml")
    assert missing.code == REFUSED
    assert "`issuer-agent config example` prints one to start from" in missing.err


async def test_an_agent_that_cannot_join(stack: Stack, tmp_path: Path) -> None:
    """With neither identity nor token an agent ends with 1, and says how to get one."""
    settings = tmp_path / "agent.yaml"
    settings.write_text(
        f"trust_domain: example.org\ndata_dir: {tmp_path}/d\nruntime_dir: {tmp_path}/r\n"
        f"workload_socket: {tmp_path}/w/s\nadmin_socket: {tmp_path}/a/s\nstatus: {{port: 0}}\n"
    )
    answer = await Programs().agent("run", "-c", settings)
    assert answer.code == REFUSED
    assert "`issuer token generate`" in answer.err
