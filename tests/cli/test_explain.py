"""``issuer explain`` and ``issuer doctor``: why, what is wrong, and what to do about it."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import yaml

from tests.support.programs import DONE, REFUSED, Programs, Ran
from tests.support.stack import Stack, a_folder, a_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")
UID = os.geteuid()
SLEEP = os.path.realpath(shutil.which("sleep") or "sleep")
STRANGER = f"unix:uid:{UID + 1}"
ELSEWHERE = "unix:path:/usr/bin/elsewhere"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    """A stack with three entries: for sleep, for another program, for another user."""
    async with a_stack() as running:
        parent, add = running.agent.agent_id, running.server.add_entry
        await add("/sleeper", parent, f"unix:uid:{UID}", f"unix:path:{SLEEP}", id="sleeper")
        await add("/elsewhere", parent, f"unix:uid:{UID}", ELSEWHERE, id="elsewhere")
        await add("/stranger", parent, STRANGER, "unix:gid:61001", id="stranger")
        await running.agent.until_svids(3)
        yield running


@pytest.fixture
def sleeper() -> Iterator[int]:
    """A process that sleeps."""
    process = subprocess.Popen([SLEEP, "60"])
    yield process.pid
    process.send_signal(signal.SIGKILL)
    process.wait()


async def test_explain_a_process_with_an_identity(programs: Programs, sleeper: int) -> None:
    """What was learnt of a process, what it gets, and what it nearly got; exit code 0."""
    text = await programs.issuer("explain", "--pid", str(sleeper))
    assert text.code == DONE
    lines = text.out.splitlines()
    assert lines[0] == f"process {sleeper}, uid {UID}, gid {os.getegid()}, {SLEEP}"
    assert lines[1] == "learnt"
    assert f"  unix:path:{SLEEP}" in lines
    assert "gets    spiffe://example.org/sleeper  (entry sleeper)" in lines
    facts = (await programs.issuer("explain", "--pid", str(sleeper), "-o", "json")).json
    assert facts["reason"] == "identity"
    assert [one["id"] for one in facts["matched"]] == ["sleeper"]
    assert facts["process"] == {
        "pid": sleeper, "uid": UID, "gid": os.getegid(), "path": SLEEP,
    }  # fmt: skip


async def test_sec_35_explain_a_process_without_an_identity(programs: Programs) -> None:
    """SEC-35: the nearest miss comes first, with the one fact that differs; exit code 1."""
    text = await programs.issuer("explain", "--pid", str(os.getpid()))
    assert text.code == REFUSED
    lines = text.out.splitlines()
    assert "no identity: none of 3 entries matches" in lines
    ours = os.path.realpath("/proc/self/exe")
    at = lines.index("nearly  spiffe://example.org/elsewhere  (entry elsewhere)")
    differs = f"the entry wants {ELSEWHERE}, the process has unix:path:{ours}"
    assert lines[at + 1].strip() == differs
    assert lines[-1].startswith("to give it one: issuer entry create")
    facts = await programs.issuer("explain", "--pid", str(os.getpid()), "-o", "yaml")
    assert facts.code == REFUSED
    assert facts.yaml["reason"] == "no_match"
    nearest = [one["entry"]["id"] for one in facts.yaml["near_misses"]]
    assert set(nearest[:2]) == {"sleeper", "elsewhere"}
    assert nearest[2:] in ([], ["stranger"]), "what differs in more comes last"


async def test_explain_selectors(programs: Programs, stack: Stack) -> None:
    """The server answers over every entry, or as one agent decides."""
    path = f"unix:path:{SLEEP}"
    matched = await programs.issuer("explain", "--selectors", f"unix:uid:{UID}", path)
    assert matched.code == DONE
    assert "gets    spiffe://example.org/sleeper" in matched.out
    missed = await programs.issuer(
        "explain", "--selectors", STRANGER, "unix:gid:7", "--agent-id",
        stack.agent.agent_id, "-o", "json",
    )  # fmt: skip
    assert missed.code == REFUSED
    nearest = missed.json["near_misses"][0]
    assert nearest["entry"]["id"] == "stranger"
    assert nearest["missing"] == [{"type": "unix", "value": "gid:61001"}]
    assert nearest["difference"] == (
        "the entry wants unix:gid:61001, the process has unix:gid:7"
    )
    nobody = await programs.issuer(
        "explain", "--selectors", "a:b", "--agent-id", "spiffe://example.org/spire/agent/x/y"
    )
    assert nobody.code == REFUSED


async def test_explain_no_process(programs: Programs) -> None:
    """A process that is not there is said to be not there."""
    child = subprocess.Popen(["true"])
    child.wait()
    answer = await programs.issuer("explain", "--pid", str(child.pid))
    assert (answer.code, answer.out) == (REFUSED, "")
    assert answer.err == f"no process {child.pid} on this node\n"


async def test_doctor_where_all_is_well(programs: Programs) -> None:
    """Server and agent answer, and every finding that is not good has an advice."""
    answer = await programs.issuer("doctor", "-o", "json")
    assert answer.code == DONE
    findings = {one["what"]: one for one in answer.json["findings"]}
    assert findings["server"]["verdict"] == findings["agent"]["verdict"] == "good"
    assert findings["server"]["seen"] == "serving"
    assert "3 entries, 3 SVIDs" in findings["agent"]["seen"]
    assert all(one["advice"] for one in findings.values() if one["verdict"] != "good")
    text = await programs.issuer("doctor")
    assert text.out.splitlines()[0].split() == ["WHAT", "VERDICT", "SEEN", "WHAT", "TO", "DO"]


def verdicts(answer: Ran) -> dict[str, str]:
    """Each finding's verdict."""
    return {one["what"]: one["verdict"] for one in answer.json["findings"]}


async def test_doctor_where_much_is_wrong() -> None:
    """Open folders, a broken database, a used port and bad settings are each found, with 1."""
    nobody = Programs({"SPIFFE_ISSUER_SOCKET": "/nonexistent/s"})
    with a_folder() as folder, socket.create_server(("127.0.0.1", 0)) as used:
        data = folder / "data"
        data.mkdir()
        data.chmod(0o755)
        settings = {
            "trust_domain": "example.org", "bind_address": "127.0.0.1",
            "bind_port": used.getsockname()[1], "data_dir": str(data),
            "runtime_dir": str(folder / "run"),
        }  # fmt: skip
        config = folder / "server.yaml"
        config.write_text(yaml.safe_dump(settings))
        database = Path(data / "issuer.db")
        found = await _doctor(nobody, config)
        assert (found["data_dir"], found["runtime_dir"], found["port"]) == (
            "bad", "warn", "warn",
        )  # fmt: skip
        assert (found["server"], found["agent"]) == ("warn", "warn")

        data.chmod(0o700)
        database = await _database_of(nobody, config)
        database.write_bytes(b"no database" * 1000)
        found = await _doctor(nobody, config)
        assert (found["data_dir"], found["database"]) == ("good", "bad")

        config.write_text("trust_domain: UPPER\n")
        found = await _doctor(nobody, config)
        assert found["settings"] == "bad"


async def _doctor(programs: Programs, config: Path) -> dict[str, str]:
    answer = await programs.issuer("doctor", "-c", config, "-o", "json")
    assert answer.code == REFUSED
    return verdicts(answer)


async def _database_of(programs: Programs, config: Path) -> Path:
    """Where the database of *config* is to be: the message that it is not there names it."""
    said = (await programs.issuer("db", "status", "-c", config)).err
    return Path(said.removeprefix("no database at ").partition(":")[0])
