"""``issuer entry`` and what comes back from it: text, JSON, YAML, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import DONE, REFUSED, Programs, Ran
from tests.support.stack import Stack

pytestmark = pytest.mark.asyncio(loop_scope="module")
PARENT = "spiffe://example.org/spire/agent/join_token/nobody"


async def create(programs: Programs, path: str, *more: str, **changes: Any) -> Ran:
    """Create an entry for *path*, below an agent that is not there."""
    return await programs.issuer(
        "entry", "create", "--spiffe-id", f"spiffe://example.org{path}", "--parent-id", PARENT,
        "--selector", "unix:uid:61999", *more, **changes,
    )  # fmt: skip


async def test_an_entry_is_created_and_shown(programs: Programs) -> None:
    """What was asked for is stored and comes back, in every style."""
    made = await create(
        programs, "/all", "-o", "json", "--entry-id", "all-1", "--selector", "unix:gid:7",
        "--x509-svid-ttl", "10m", "--jwt-svid-ttl", "90", "--dns", "all.example.org",
        "--hint", "internal", "--expires-at", "2100-01-01T00:00:00Z",
    )  # fmt: skip
    assert made.code == DONE
    entry = made.json["results"][0]["entry"]
    assert entry["id"] == "all-1"
    assert entry["spiffe_id"] == {"trust_domain": "example.org", "path": "/all"}
    assert entry["selectors"] == [
        {"type": "unix", "value": "gid:7"}, {"type": "unix", "value": "uid:61999"},
    ]  # fmt: skip
    assert (entry["x509_svid_ttl"], entry["jwt_svid_ttl"]) == (600, 90)
    assert entry["expires_at"] == "4102444800"
    assert entry["admin"] is False, "defaults are printed too"

    as_json = await programs.issuer("entry", "show", "--entry-id", "all-1", "-o", "json")
    as_yaml = await programs.issuer("entry", "show", "--entry-id", "all-1", "-o", "yaml")
    assert as_json.json == as_yaml.yaml == {"entries": [entry]}
    quiet = await programs.issuer("entry", "show", "-q", "--entry-id", "all-1")
    assert quiet.out == "all-1\n"
    text = await programs.issuer("entry", "show", "--entry-id", "all-1")
    for fact in (
        "all-1", "spiffe://example.org/all", PARENT, "unix:gid:7", "unix:uid:61999", "600 s",
        "90 s", "all.example.org", "internal",
    ):  # fmt: skip
        assert fact in text.out


async def test_a_similar_entry_is_refused_in_every_style(programs: Programs) -> None:
    """The code is 1 whatever the style, and the answer names the entry that is there."""
    await create(programs, "/similar", "--entry-id", "first")
    for style in ("text", "json", "yaml"):
        again = await create(programs, "/similar", "-o", style)
        assert again.code == REFUSED, style
        assert again.err == "similar entry already exists: entry first\n"
        if style == "text":
            assert again.out == ""
            continue
        (result,) = (again.json if style == "json" else again.yaml)["results"]
        assert result["status"]["code"] == 6
        assert result["entry"]["id"] == "first"


async def test_an_update_replaces(programs: Programs) -> None:
    """What an update leaves out is cleared, as in SPIRE, and the revision grows."""
    await create(programs, "/update", "--entry-id", "update-1", "--hint", "old", "--dns", "x.y")
    done = await programs.issuer(
        "entry", "update", "--entry-id", "update-1", "--spiffe-id", "spiffe://example.org/new",
        "--parent-id", PARENT, "--selector", "unix:uid:61998", "-o", "json",
    )  # fmt: skip
    assert done.code == DONE
    entry = done.json["results"][0]["entry"]
    assert (entry["hint"], entry["dns_names"], entry["revision_number"]) == ("", [], "1")
    assert entry["spiffe_id"]["path"] == "/new"


async def test_what_is_not_there(programs: Programs) -> None:
    """Showing, updating or deleting a missing entry is refused, and says where to look."""
    for arguments in (
        ("show", "--entry-id", "missing"),
        ("delete", "missing", "-o", "json"),
        ("update", "--entry-id", "missing", "--spiffe-id", "spiffe://example.org/x",
         "--parent-id", PARENT, "--selector", "unix:uid:1", "-o", "yaml"),
    ):  # fmt: skip
        answer = await programs.issuer("entry", *arguments)
        assert answer.code == REFUSED, arguments
        assert "not found" in answer.err
        assert "`issuer entry show` lists what is there" in answer.err


async def test_a_file_of_entries(programs: Programs, tmp_path: Path) -> None:
    """A file holds entries in SPIRE's form and in ours; one that fails fails the command."""
    entries = [
        {"spiffe_id": "spiffe://example.org/f1", "parent_id": PARENT,
         "selectors": [{"type": "unix", "value": "uid:1"}], "x509_svid_ttl": 60,
         "entryExpiry": 4102444800, "entry_id": "f-1"},
        {"spiffe_id": {"trust_domain": "example.org", "path": "/f2"}, "parent_id": PARENT,
         "selectors": ["unix:uid:1"], "id": "f-2"},
    ]  # fmt: skip
    file = tmp_path / "entries.json"
    file.write_text(json.dumps({"entries": entries}))
    done = await programs.issuer("entry", "create", "-f", file, "-o", "json")
    assert done.code == DONE
    made = [one["entry"] for one in done.json["results"]]
    assert [one["id"] for one in made] == ["f-1", "f-2"]
    assert made[0]["expires_at"] == "4102444800"

    # What `show` prints can be given back; standard input is a file too.
    shown = await programs.issuer("entry", "show", "--entry-id", "f-1", "-o", "json")
    await programs.issuer("entry", "delete", "f-1")
    both = {"entries": [*shown.json["entries"], entries[1]]}
    again = await programs.issuer("entry", "create", "-data", "-", stdin=json.dumps(both))
    assert again.code == REFUSED, "the second is there already"
    assert "entry f-1, revision" in again.out
    assert "similar entry already exists: entry f-2" in again.err


async def test_filters(programs: Programs) -> None:
    """Show and count take the same filters, and all that are given must hold."""
    await create(programs, "/filter/a", "--selector", "unix:gid:5", "--hint", "h5")
    await create(programs, "/filter/b", "--selector", "unix:gid:6")
    for filters, wanted in (
        (("--spiffe-id", "spiffe://example.org/filter/a", "--hint", "h5"), {"/filter/a"}),
        (("--selector", "unix:gid:6"), {"/filter/b"}),
        (("--selector", "unix:gid:6", "--match-selectors-on", "exact"), set()),
        (("--selector", "unix:gid:6", "--hint", "h5"), set()),
        (("-selector", "unix:gid:5", "-selector", "unix:gid:6", "-matchSelectorsOn", "any"),
         {"/filter/a", "/filter/b"}),
    ):  # fmt: skip
        found = (await programs.issuer("entry", "list", "-o", "json", *filters)).json["entries"]
        assert {one["spiffe_id"]["path"] for one in found} == wanted, filters
    counted = await programs.issuer("entry", "count", "--selector", "unix:gid:6")
    assert counted.out == "1 entries\n"
    empty = await programs.issuer("entry", "show", "--hint", "none such")
    assert (empty.code, empty.out) == (
        DONE, "no entry matches: `issuer entry create` adds one\n",
    )  # fmt: skip


async def test_delete(programs: Programs) -> None:
    """Several are deleted at once; one that is missing makes the code 1, the others go."""
    for one in ("d-1", "d-2"):
        await create(programs, f"/{one}", "--entry-id", one)
    answer = await programs.issuer("entry", "delete", "d-1", "no-such", "-entryID", "d-2")
    assert answer.code == REFUSED
    assert answer.out == "deleted d-1\ndeleted d-2\n"
    assert answer.err.startswith("no-such: ")


async def test_spire_spelling(programs: Programs) -> None:
    """An operator's fingers may type SPIRE's options, with one hyphen or two."""
    answer = await programs.issuer(
        "entry", "create", "-spiffeID", "spiffe://example.org/spire-like", "--parentID", PARENT,
        "-selector=unix:uid:1", "-x509SVIDTTL", "120", "-dns", "a.b", "-output", "json",
    )  # fmt: skip
    assert answer.code == DONE
    assert answer.json["results"][0]["entry"]["x509_svid_ttl"] == 120
    pretty = await programs.issuer("entry", "count", "-output", "pretty")
    assert pretty.out.endswith(" entries\n")


@pytest.mark.parametrize("option", ["--node", "-node"])
async def test_a_group_of_nodes(programs: Programs, option: str) -> None:
    """``--node``, SPIRE's ``-node``, makes the server the parent without naming it."""
    answer = await programs.issuer(
        "entry", "create", option, "--spiffe-id", f"spiffe://example.org/nodes{option}",
        "--selector", "k8s_psat:cluster:prod", "-o", "json",
    )  # fmt: skip
    assert answer.code == DONE
    entry = answer.json["results"][0]["entry"]
    assert entry["parent_id"] == {"trust_domain": "example.org", "path": "/spire/server"}


async def test_sec_04_the_server_refuses_reserved_names(
    programs: Programs, stack: Stack
) -> None:
    """SEC-04: an entry under the reserved root is refused by the server, with code 1."""
    answer = await create(programs, "/spire/agent/x")
    assert answer.code == REFUSED
    assert "failed to convert entry" in answer.err
    assert stack.server.process.ended() is None
