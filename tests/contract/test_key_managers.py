"""What every key manager promises, in memory and on disk."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from ca.keys.disk import DiskKeyManager
from ca.keys.memory import MemoryKeyManager
from ca.keys.protocol import (
    KeyManager,
    KeyPurpose,
    KeyPurposeError,
    KeyStoreError,
    SigningKey,
)
from spiffe_core.keys import KeyKind, key_of_spki

X509, JWT = KeyPurpose.X509_CA, KeyPurpose.JWT
EC = KeyKind.EC_P256


@pytest.fixture(params=["memory", "disk"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> KeyManager:
    """One of the key managers, empty."""
    makers: dict[str, Callable[[], KeyManager]] = {
        "memory": MemoryKeyManager,
        "disk": lambda: DiskKeyManager(tmp_path / "keys"),
    }
    return makers[request.param]()


def works(key: SigningKey) -> None:
    """What the key signs verifies with its public half."""
    private = key.private_for(key.purpose)
    public = key_of_spki(key.public_key)
    if isinstance(private, ec.EllipticCurvePrivateKey):
        assert isinstance(public, ec.EllipticCurvePublicKey)
        algorithm = ec.ECDSA(hashes.SHA256())
        public.verify(private.sign(b"data", algorithm), b"data", algorithm)
    else:
        assert isinstance(public, rsa.RSAPublicKey)
        signature = private.sign(b"data", padding.PKCS1v15(), hashes.SHA256())
        public.verify(signature, b"data", padding.PKCS1v15(), hashes.SHA256())


@pytest.mark.parametrize("purpose", KeyPurpose)
@pytest.mark.parametrize("kind", [EC, KeyKind.EC_P384, KeyKind.RSA_2048])
async def test_made_and_found_again(
    keys: KeyManager, kind: KeyKind, purpose: KeyPurpose
) -> None:
    """SEC-61: a key that was made is found again by its name and purpose, and signs."""
    made = await keys.generate("one", kind, purpose)
    found = await keys.load("one", purpose)

    assert (found.key_id, found.purpose) == ("one", purpose)
    assert found.public_key == made.public_key
    works(made)
    works(found)
    assert await keys.key_ids() == {"one"}


@pytest.mark.parametrize(
    ("kind", "size"),
    [(EC, 256), (KeyKind.EC_P384, 384), (KeyKind.RSA_2048, 2048), (KeyKind.RSA_4096, 4096)],
)
async def test_kinds(kind: KeyKind, size: int) -> None:
    """SEC-15: each kind is what its name says."""
    made = await MemoryKeyManager().generate("one", kind, JWT)
    assert made.private_for(JWT).key_size == size


async def test_keys_differ(keys: KeyManager) -> None:
    """SEC-60: no two keys are the same."""
    made = [await keys.generate(f"key-{number}", EC, JWT) for number in range(5)]
    assert len({one.public_key for one in made}) == 5
    assert await keys.key_ids() == {f"key-{number}" for number in range(5)}


@pytest.mark.parametrize("second", KeyPurpose)
async def test_a_name_is_taken_once(keys: KeyManager, second: KeyPurpose) -> None:
    """SEC-60, SEC-61: a name that is taken, for whichever purpose, keeps its key."""
    first = await keys.generate("one", EC, X509)
    with pytest.raises(KeyStoreError, match="exists already"):
        await keys.generate("one", EC, second)
    assert (await keys.load("one", X509)).public_key == first.public_key


async def test_two_at_once(keys: KeyManager) -> None:
    """SEC-61: of callers who want one name at once, one gets it, and its key is kept."""
    done = await asyncio.gather(
        *(keys.generate("one", KeyKind.EC_P384, JWT) for _ in range(4)), return_exceptions=True
    )
    made = [one for one in done if isinstance(one, SigningKey)]
    assert all(isinstance(one, SigningKey | KeyStoreError) for one in done)
    assert len(made) == 1
    assert made[0].public_key == (await keys.load("one", JWT)).public_key


@pytest.mark.parametrize("purpose", KeyPurpose)
async def test_a_missing_key(keys: KeyManager, purpose: KeyPurpose) -> None:
    """SEC-61: what is not there is an error, and no new key."""
    with pytest.raises(KeyStoreError):
        await keys.load("one", purpose)
    assert await keys.key_ids() == frozenset()


async def test_another_purpose(keys: KeyManager) -> None:
    """SEC-60: a key is found for its own purpose alone."""
    await keys.generate("one", EC, X509)
    with pytest.raises(KeyStoreError):
        await keys.load("one", JWT)


async def test_delete(keys: KeyManager) -> None:
    """SEC-61: a deleted key is gone, the others stay, and deleting it again is fine."""
    await keys.generate("one", EC, X509)
    await keys.generate("two", EC, JWT)
    for _ in range(2):
        await keys.delete("one")
        assert await keys.key_ids() == {"two"}
    with pytest.raises(KeyStoreError):
        await keys.load("one", X509)
    assert (await keys.generate("one", EC, JWT)).key_id == "one"


@pytest.mark.parametrize(
    "name", ["", "A", "a_b", "a.b", "../a", "a/b", "a\0", "a b", "ä", "a" * 101, ".", "a\n"]
)
async def test_names(keys: KeyManager, name: str) -> None:
    """SEC-61: a name that could be another file's is refused wherever it is used."""
    for call in (
        keys.generate(name, EC, JWT), keys.load(name, JWT), keys.delete(name),
    ):  # fmt: skip
        with pytest.raises(KeyStoreError, match="name must be"):
            await call
    assert await keys.key_ids() == frozenset()


async def test_the_longest_name(keys: KeyManager) -> None:
    """SEC-61: a name of a hundred characters is kept."""
    name = "a-9" * 33 + "z"
    await keys.generate(name, EC, JWT)
    works(await keys.load(name, JWT))


async def test_sec_60_purpose_is_a_type_error(keys: KeyManager) -> None:
    """SEC-60: using a key for another purpose is a type error, loaded or fresh."""
    for key in (await keys.generate("one", EC, X509), await keys.load("one", X509)):
        assert key.private_for(X509)
        with pytest.raises(TypeError):
            key.private_for(JWT)
        with pytest.raises(KeyPurposeError, match="for x509-ca alone"):
            key.private_for(JWT)


async def test_a_key_is_in_no_repr(keys: KeyManager) -> None:
    """SEC-90: a key's repr holds its name and purpose, and nothing of the key."""
    key = await keys.generate("one", EC, X509)
    assert repr(key) == ("SigningKey(key_id='one', purpose=<KeyPurpose.X509_CA: 'x509-ca'>)")
    with pytest.raises(AttributeError):
        key.key_id = "other"  # type: ignore[misc]
