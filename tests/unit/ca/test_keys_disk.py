"""Key files: how they appear, what is refused, and what a crash or damage leaves (SEC-61)."""

import os
import random
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from ca.keys.disk import (
    DiskKeyManager,
    make_private_folder,
    read_private_file,
    write_private_file,
)
from ca.keys.protocol import KeyPurpose, KeyStoreError, SigningKey, pkcs8_of
from spiffe_core.crashpoints import arm
from spiffe_core.keys import KeyKind
from tests.support.authorities import a_key
from tests.support.authorities import pkcs8_of as any_pkcs8_of

X509, JWT = KeyPurpose.X509_CA, KeyPurpose.JWT
EC = KeyKind.EC_P256
POINTS = (
    "key.generated", "key_file.opened", "key_file.written", "key_file.synced",
    "key_file.renamed", "key_file.folder_synced",
)  # fmt: skip


class CrashError(Exception):
    """The process ended here."""


def crash() -> None:
    """End."""
    raise CrashError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for keys, which is not there yet."""
    return tmp_path / "data" / "keys"


@pytest.fixture
def open_umask() -> Iterator[None]:
    """A umask that takes nothing away."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm("", crash)


def file_of(folder: Path) -> Path:
    """The file of the key ``one``."""
    return folder / "one.x509-ca.key"


async def a_stored_key(folder: Path, kind: KeyKind = EC) -> SigningKey:
    """The key ``one``, just made."""
    return await DiskKeyManager(folder).generate("one", kind, X509)


def mode_of(path: Path) -> int:
    """The permission bits."""
    return stat.S_IMODE(path.lstat().st_mode)


# How files appear.


@pytest.mark.usefixtures("open_umask")
async def test_sec_61_modes_under_an_open_umask(folder: Path) -> None:
    """SEC-61: file 0600, folder 0700, and 0700 for all that was made above it; umask 000."""
    await a_stored_key(folder)
    assert mode_of(file_of(folder)) == 0o600
    assert mode_of(folder) == mode_of(folder.parent) == 0o700


@pytest.mark.usefixtures("open_umask")
@pytest.mark.parametrize("point", POINTS)
async def test_sec_61_no_other_mode_is_ever_seen(folder: Path, point: str) -> None:
    """SEC-61: whoever looks at any moment of the making sees modes 0600 and 0700 alone."""
    make_private_folder(folder)
    seen: list[tuple[str, int]] = []

    def look() -> None:
        seen.append((folder.name, mode_of(folder)))
        seen.extend((one.name, mode_of(one)) for one in folder.iterdir())

    arm(point, look)
    await a_stored_key(folder)
    assert seen[0] == ("keys", 0o700)
    assert {mode for _, mode in seen[1:]} <= {0o600}
    assert len(seen) == (1 if point == "key.generated" else 2)


async def test_sec_61_a_whole_file_or_none(folder: Path) -> None:
    """SEC-61: the file is PKCS#8 DER of the key, and nothing stays beside it."""
    key = await a_stored_key(folder)
    assert file_of(folder).read_bytes() == pkcs8_of(key.private_for(X509))
    assert [one.name for one in folder.iterdir()] == ["one.x509-ca.key"]


@pytest.mark.parametrize("point", POINTS)
async def test_sec_61_a_crash_leaves_no_half_file(folder: Path, point: str) -> None:
    """SEC-61, SEC-100: killed anywhere in the making there is the whole key or none of it."""
    arm(point, crash)
    with pytest.raises(CrashError):
        await a_stored_key(folder)

    keys = DiskKeyManager(folder)
    if point in ("key_file.renamed", "key_file.folder_synced"):
        assert (await keys.load("one", X509)).key_id == "one"
    else:
        assert not file_of(folder).exists()
        with pytest.raises(KeyStoreError):
            await keys.load("one", X509)
    assert await keys.key_ids() <= {"one"}
    await keys.delete("one")
    assert await keys.key_ids() == frozenset()
    assert not folder.exists() or list(folder.iterdir()) == []
    assert await a_stored_key(folder)


async def test_what_a_crash_left_is_in_nobody_s_way(folder: Path) -> None:
    """SEC-61: a half-written leftover, or a link in its place, is replaced and not followed."""
    make_private_folder(folder)
    victim = folder.parent / "victim"
    victim.write_text("precious")
    (folder / ".one.x509-ca.key.new").symlink_to(victim)
    key = await a_stored_key(folder)
    assert victim.read_text() == "precious"
    assert (await DiskKeyManager(folder).load("one", X509)).public_key == key.public_key


async def test_a_link_in_the_place_of_a_key(folder: Path) -> None:
    """SEC-61: a link where a key is to be made takes the name, even one that leads nowhere."""
    make_private_folder(folder)
    file_of(folder).symlink_to(folder.parent / "nowhere")
    with pytest.raises(KeyStoreError, match="exists already"):
        await a_stored_key(folder)
    assert not (folder.parent / "nowhere").exists()


async def test_files_of_others_are_left_alone(folder: Path) -> None:
    """SEC-61: files that are no keys are not listed, and not touched."""
    await a_stored_key(folder)
    for name in ("README", ".hidden", "Bad_Name.x509-ca.key", "..key", ".key", "one.key"):
        (folder / name).write_text("x")
    keys = DiskKeyManager(folder)
    assert await keys.key_ids() == {"one"}
    await keys.delete("one")
    assert len(list(folder.iterdir())) == 6


# What is refused.


@pytest.mark.parametrize(
    "mode", [0o640, 0o604, 0o660, 0o606, 0o644, 0o666, 0o610, 0o601, 0o677]
)
async def test_sec_61_a_file_that_is_open_to_others(folder: Path, mode: int) -> None:
    """SEC-61: a key that a group or others may read, write or run is refused, with the cure."""
    await a_stored_key(folder)
    file_of(folder).chmod(mode)
    with pytest.raises(KeyStoreError, match=r"open to others: chmod 0600 .*one\.x509-ca\.key"):
        await DiskKeyManager(folder).load("one", X509)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
async def test_modes_that_are_private(folder: Path, mode: int) -> None:
    """SEC-61: what the owner alone may do is the owner's business."""
    await a_stored_key(folder)
    file_of(folder).chmod(mode)
    assert await DiskKeyManager(folder).load("one", X509)


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o755, 0o770, 0o777, 0o711, 0o1777])
async def test_sec_61_a_folder_that_is_open_to_others(folder: Path, mode: int) -> None:
    """SEC-61: a folder that others can enter is refused, for making and for loading."""
    await a_stored_key(folder)
    folder.chmod(mode)
    keys = DiskKeyManager(folder)
    for call in (keys.load("one", X509), keys.generate("two", EC, JWT)):
        with pytest.raises(KeyStoreError, match="open to others: chmod 0700"):
            await call


async def test_sec_61_links_are_refused(folder: Path) -> None:
    """SEC-61: a key file that is a link is refused, and so is a linked folder."""
    await a_stored_key(folder)
    real = folder.parent / "real.key"
    file_of(folder).rename(real)
    file_of(folder).symlink_to(real)
    with pytest.raises(KeyStoreError, match="cannot read"):
        await DiskKeyManager(folder).load("one", X509)

    real.rename(file_of(folder))
    (folder.parent / "linked").symlink_to(folder)
    linked = DiskKeyManager(folder.parent / "linked")
    for call in (linked.load("one", X509), linked.generate("two", EC, JWT)):
        with pytest.raises(KeyStoreError, match="belongs to this user"):
            await call


def a_pipe(path: Path) -> None:
    """A named pipe that nobody writes to."""
    os.mkfifo(path, 0o600)


def a_directory(path: Path) -> None:
    """A folder."""
    path.mkdir(mode=0o700)


def a_socket(path: Path) -> None:
    """A socket's name; the socket itself is closed."""
    here = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


@pytest.mark.parametrize("make", [a_pipe, a_directory, a_socket])
async def test_sec_61_what_is_no_file(folder: Path, make: Callable[[Path], None]) -> None:
    """SEC-61: a pipe, a folder or a socket in a key's place is refused at once."""
    make_private_folder(folder)
    make(file_of(folder))
    with pytest.raises(KeyStoreError, match=r"plain file|cannot read"):
        await DiskKeyManager(folder).load("one", X509)


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """SEC-61: a folder under a file, or where nothing can be made, is said by our own error."""
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "keys", tmp_path / "file", Path("/proc/none/keys")):
        with pytest.raises(KeyStoreError, match=r"cannot|must be a folder"):
            await DiskKeyManager(place).generate("one", EC, X509)
    with pytest.raises(KeyStoreError, match="cannot list"):
        await DiskKeyManager(tmp_path / "file").key_ids()
    with pytest.raises(KeyStoreError, match="cannot remove"):
        await DiskKeyManager(tmp_path / "file").delete("one")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """SEC-61: what cannot be written leaves what was there."""
    with pytest.raises(KeyStoreError, match="cannot write"):
        write_private_file(tmp_path / "nowhere" / "one.key", b"data")
    (tmp_path / "full").mkdir()
    with pytest.raises(KeyStoreError, match="cannot write"):
        write_private_file(tmp_path / "full", b"data")
    assert (tmp_path / "full").is_dir()


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """SEC-61: writing again replaces the file in one step, its mode with it."""
    path = tmp_path / "a.key"
    path.write_text("old")
    path.chmod(0o644)
    write_private_file(path, b"new")
    assert (read_private_file(path), mode_of(path)) == (b"new", 0o600)


# Damage.


def variants(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Corrupted copies of a key file."""
    rand = random.Random(seed)
    yield from (b"", b"\0", whole[:1], whole[:-1], whole[1:], whole + b"\0", whole * 2)
    yield from (bytes(len(whole)), b"\xff" * len(whole), rand.randbytes(len(whole)))
    yield from (whole[::-1], whole.hex().encode(), b"\n" + whole, b"x" * 16384, b"x" * 16385)
    for _ in range(count):
        damaged = bytearray(whole)
        match rand.randrange(4):
            case 0:
                damaged[rand.randrange(len(damaged))] ^= 1 << rand.randrange(8)
            case 1:
                damaged[rand.randrange(len(damaged))] = rand.randrange(256)
            case 2:
                del damaged[rand.randrange(len(damaged)) :]
            case 3:
                start = rand.randrange(len(damaged))
                damaged[start : start + 16] = bytes(16)
        yield bytes(damaged)


@pytest.mark.parametrize(
    ("kind", "count"), [(EC, 120), (KeyKind.EC_P384, 60), (KeyKind.RSA_2048, 60)]
)
async def test_sec_61_corrupted_files(folder: Path, kind: KeyKind, count: int) -> None:
    """
    SEC-61, SEC-103: of over 200 corrupted files each is refused by name, or gives the one key
    that was stored; none is replaced, repaired or joined by another.
    """
    key = await a_stored_key(folder, kind)
    keys, path = DiskKeyManager(folder), file_of(folder)
    whole = path.read_bytes()
    refused = 0
    for damaged in variants(whole, count, seed=count):
        path.write_bytes(damaged)
        try:
            assert (await keys.load("one", X509)).public_key == key.public_key
        except KeyStoreError as error:
            refused += 1
            assert str(path) in str(error)
            assert "restore it from a backup" in str(error) or "too long" in str(error)
        assert path.read_bytes() == damaged
        assert await keys.key_ids() == {"one"}
    assert refused > count * 0.5
    path.write_bytes(whole)
    assert (await keys.load("one", X509)).public_key == key.public_key


def foreign() -> dict[str, bytes]:
    """Sound files of other kinds."""
    key = a_key("p256", "disk")
    none = serialization.NoEncryption()
    return {
        "Ed25519": any_pkcs8_of(a_key("ed25519")),
        "DSA": any_pkcs8_of(a_key("dsa")),
        "PEM": key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none
        ),
        "a public key": key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
        "encrypted": key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        ),
    }


@pytest.mark.parametrize("what", foreign())
async def test_sec_61_sound_files_of_another_kind(folder: Path, what: str) -> None:
    """SEC-61: a key of another kind, encrypted, or in another form is refused by name."""
    await a_stored_key(folder)
    file_of(folder).write_bytes(foreign()[what])
    with pytest.raises(
        KeyStoreError, match=r"one\.x509-ca\.key (is damaged|holds a key of an)"
    ):
        await DiskKeyManager(folder).load("one", X509)


async def test_sec_90_errors_say_nothing_of_the_key(folder: Path) -> None:
    """SEC-90: no error or repr of the key store holds bytes of a key."""
    key = await a_stored_key(folder)
    private = pkcs8_of(key.private_for(X509))
    file_of(folder).write_bytes(private[:-3])
    with pytest.raises(KeyStoreError) as caught:
        await DiskKeyManager(folder).load("one", X509)
    shown = f"{caught.value!r} {caught.value.__cause__!r} {key!r}"
    assert private.hex()[40:80] not in shown
    assert repr(private[20:40])[2:-1] not in shown
