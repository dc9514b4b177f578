"""Keys in memory: for tests, and for a trust domain that need not outlive its process."""

import asyncio

from ca.keys.protocol import (
    KeyPurpose,
    KeyStoreError,
    SigningKey,
    check_key_id,
    generate_private_key,
)
from spiffe_core.keys import KeyKind


class MemoryKeyManager:
    """A `KeyManager` that forgets everything with the process."""

    def __init__(self) -> None:
        self._keys: dict[str, SigningKey] = {}

    async def generate(self, key_id: str, kind: KeyKind, purpose: KeyPurpose) -> SigningKey:
        """Make a key; see `KeyManager`."""
        check_key_id(key_id)
        self._check_free(key_id)
        private = await asyncio.to_thread(generate_private_key, kind)
        self._check_free(key_id)  # another may have taken it meanwhile
        self._keys[key_id] = SigningKey(key_id, purpose, private)
        return self._keys[key_id]

    def _check_free(self, key_id: str) -> None:
        if key_id in self._keys:
            raise KeyStoreError(f"a key named {key_id} exists already")

    async def load(self, key_id: str, purpose: KeyPurpose) -> SigningKey:
        """Return a key; see `KeyManager`."""
        key = self._keys.get(check_key_id(key_id))
        if key is None or key.purpose is not purpose:
            raise KeyStoreError(f"no {purpose.value} key named {key_id}")
        return key

    async def delete(self, key_id: str) -> None:
        """Forget a key."""
        self._keys.pop(check_key_id(key_id), None)

    async def key_ids(self) -> frozenset[str]:
        """Return all names."""
        return frozenset(self._keys)
