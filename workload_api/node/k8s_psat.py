"""
A projected service-account token of Kubernetes: this pod proves the node it runs on.

Source: SPIRE API 8.5.  The kubelet replaces the file long before the token in it ends, so it is
read anew for each attestation, and kept nowhere.
"""

import asyncio
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, Final

from spiffe_core.strictjson import dumps
from workload_api.node.proof import NoWayToAttestError

MAX_TOKEN_BYTES: Final = 16 * 1024
"""As much as our server takes."""


@dataclass(frozen=True)
class K8sPsatProof:
    """Proves the node as often as it is asked to."""

    type: ClassVar[str] = "k8s_psat"
    can_repeat: ClassVar[bool] = True
    is_given: ClassVar[bool] = True
    cluster: str
    token_path: Path

    async def payload(self) -> bytes:
        """See `NodeProof`."""
        token = await asyncio.to_thread(self._read)
        return dumps({"cluster": self.cluster, "token": token})

    def what_to_do(self, expired_at: datetime | None) -> str:
        """See `NodeProof`."""
        del expired_at  # another token is there already
        return (
            f'is cluster "{self.cluster}" in the server\'s settings, with the service account '
            "of this agent's pod in its service_account_allow_list, and is the token at "
            f"{self.token_path} for its audience?"
        )

    def _read(self) -> str:
        """The whole file, as it is; blocks for as long as a small local file takes."""
        try:
            with open(self.token_path, "rb") as file:
                found = file.read(MAX_TOKEN_BYTES + 1)
        except OSError as error:
            raise NoWayToAttestError(
                f"cannot read {self.token_path}: {error.strerror}; mount a projected volume "
                "with a serviceAccountToken for the audience spire-server there, or set "
                "kubernetes.token_path"
            ) from error
        if not found or len(found) > MAX_TOKEN_BYTES:
            raise NoWayToAttestError(
                f"{self.token_path} is empty, or longer than {MAX_TOKEN_BYTES} bytes: it must "
                "be a projected service-account token"
            )
        try:
            return found.decode("ascii")
        except UnicodeDecodeError:
            raise NoWayToAttestError(f"{self.token_path} holds no token, but binary") from None
