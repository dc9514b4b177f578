"""Key files of other users; only root can make one (SEC-61)."""

import os
from pathlib import Path

import pytest

from ca.keys.disk import DiskKeyManager
from ca.keys.protocol import KeyPurpose, KeyStoreError
from spiffe_core.keys import KeyKind

NOBODY = 65534
X509 = KeyPurpose.X509_CA

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away"),
]


async def test_sec_61_a_file_of_another_user(tmp_path: Path) -> None:
    """SEC-61: a key file that belongs to somebody else is refused, private as it is."""
    keys = DiskKeyManager(tmp_path / "keys")
    await keys.generate("one", KeyKind.EC_P256, X509)
    assert await keys.load("one", X509)
    os.chown(tmp_path / "keys" / "one.x509-ca.key", NOBODY, NOBODY)
    with pytest.raises(KeyStoreError, match="belongs to this user"):
        await keys.load("one", X509)


async def test_sec_61_a_folder_of_another_user(tmp_path: Path) -> None:
    """SEC-61: a folder that belongs to somebody else is refused, for making and for loading."""
    keys = DiskKeyManager(tmp_path / "keys")
    await keys.generate("one", KeyKind.EC_P256, X509)
    os.chown(tmp_path / "keys", NOBODY, NOBODY)
    for call in (keys.load("one", X509), keys.generate("two", KeyKind.EC_P256, X509)):
        with pytest.raises(KeyStoreError, match="belongs to this user"):
            await call
