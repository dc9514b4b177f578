"""
From what a process gets, and the names it asks for, to Envoy's secrets.

Source: SDS-03 to SDS-07, SEC-11, SEC-85, FED-43.  A name is looked for among what the caller
has, never among what there is.  An answer is built once for all streams that get the same
(architecture A14); its version is made of its content, so that the same is called the same on
every stream and after a restart.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final

from spiffe_core.bundle import Bundle
from spiffe_core.errors import InternalError, MalformedError
from spiffe_core.pem import certificates_to_pem, private_key_to_pem
from spiffe_core.spiffeid import TrustDomain
from spiffe_core.x509svid import X509Svid
from spiffe_wire.pb.envoy.extensions.transport_sockets.tls.v3 import (
    secret_pb2,
    tls_spiffe_validator_config_pb2,
)
from spiffe_wire.pb.envoy.service.discovery.v3 import discovery_pb2
from workload_api.cache.cache import Identity, View
from workload_api.endpoint.responses import Made, check_size
from workload_api.sds.request import TYPE_URL, Node

VALIDATOR: Final = "envoy.tls.cert_validator.spiffe"
NONCE_FIELD: Final = bytes([5 << 3 | 2])  # DiscoveryResponse.nonce, of a length
_VERSION_DIGITS: Final = 16


@dataclass(frozen=True, slots=True)
class Terms:
    """What the operator has set: three names, and whether roots are a plain ``trusted_ca``."""

    default_svid: str = "default"
    default_bundle: str = "ROOTCA"
    all_bundles: str = "ALL"
    is_plain: bool = False

    def plain_for(self, node: Node) -> bool:
        """True when *node* gets a plain ``trusted_ca``; what it says of itself goes first."""
        if node.is_old:
            return True
        said = node.disables_validator
        return self.is_plain if said is None else said

    def check(self, names: tuple[str, ...], *, is_plain: bool) -> None:
        """
        Refuse what can never be answered.

        Raises:
            MalformedError: every trust domain in one store; each could speak for the others.
        """
        if is_plain and self.all_bundles in names:
            raise MalformedError(
                f"{self.all_bundles} needs Envoy's SPIFFE validator, which is off for this "
                "node: a plain trusted_ca is for one trust domain (FED-43); ask for "
                "spiffe://<trust domain>"
            )


@dataclass(frozen=True, slots=True)
class Certificate:
    """A ``tls_certificate``."""

    name: str
    identity: Identity

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for certificates whose content is the same."""
        return (self.name, self.identity.entry.id, self.identity.svid.serial_number)


@dataclass(frozen=True, slots=True)
class Roots:
    """A ``validation_context``."""

    name: str
    bundles: tuple[Bundle, ...]
    is_plain: bool

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for roots whose content is the same, for as long as the bundles live."""
        return (self.name, self.is_plain, *(id(bundle) for bundle in self.bundles))


@dataclass(frozen=True, slots=True)
class Found:
    """What the names asked for stand for now."""

    secrets: tuple[Certificate | Roots, ...] = ()
    unknown: tuple[str, ...] = ()
    """Not the caller's: another's and nobody's are the same (SEC-85)."""
    pending: tuple[str, ...] = ()
    """The caller's, and being signed."""
    is_early: bool = False
    """An SVID that is being signed will be in it, or take the place of one."""

    @property
    def is_whole(self) -> bool:
        """True when every name is there: nothing else is ever sent (SDS-07)."""
        return bool(self.secrets) and not self.unknown and not self.pending

    @property
    def is_possible(self) -> bool:
        """True when nothing is missing but what is being signed."""
        return not self.unknown and bool(self.secrets or self.pending)


@dataclass(frozen=True, slots=True)
class Answer:
    """A ``DiscoveryResponse`` that lacks its nonce."""

    version: str
    body: bytes = field(repr=False)

    def with_nonce(self, nonce: str) -> bytes:
        """Return the message; fields of protobuf may stand in any order."""
        return self.body + NONCE_FIELD + bytes([len(nonce)]) + nonce.encode()


def find(
    view: View,
    own: TrustDomain,
    names: tuple[str, ...],
    terms: Terms,
    *,
    is_plain: bool,
) -> Found:
    """Return what *names* stand for to a process with *view*, of the trust domain *own*."""
    if not view.decision.matched:
        return Found(unknown=names)
    if not names:
        return _everything(view, is_plain=is_plain)
    secrets: list[Certificate | Roots] = []
    unknown, pending, is_early = [], [], False
    for name in names:
        secret = _one(view, own, name, terms, is_plain=is_plain)
        if secret is not None:
            secrets.append(secret)
        elif name in _coming(view, terms):
            pending.append(name)
        else:
            unknown.append(name)
        if name == terms.default_svid and view.missing:
            # It is the first entry's; another takes its place when that cannot be signed for.
            is_early = is_early or view.missing[0] == view.decision.matched[0]
    return Found(tuple(secrets), tuple(unknown), tuple(pending), is_early)


def _everything(view: View, *, is_plain: bool) -> Found:
    first = {one.entry.spiffe_id.uri: one for one in reversed(view.identities)}
    names = dict.fromkeys(one.entry.spiffe_id.uri for one in view.identities)
    certificates = [Certificate(name, first[name]) for name in names]
    if not certificates:
        return Found(pending=tuple(one.spiffe_id.uri for one in view.missing), is_early=True)
    roots = [Roots(name.id.uri, (bundle,), is_plain) for name, bundle in _bundles(view).items()]
    return Found((*certificates, *roots), is_early=bool(view.missing))


def _one(
    view: View, own: TrustDomain, name: str, terms: Terms, *, is_plain: bool
) -> Certificate | Roots | None:
    if name == terms.default_svid:
        return Certificate(name, view.identities[0]) if view.identities else None
    bundles = _bundles(view)
    if name == terms.all_bundles:
        # Without our own it is not all.
        return Roots(name, tuple(bundles.values()), is_plain) if own in bundles else None
    if name == terms.default_bundle:
        return Roots(name, (bundles[own],), is_plain) if own in bundles else None
    for bundle in bundles.values():
        if bundle.trust_domain.id.uri == name:
            return Roots(name, (bundle,), is_plain)
    for identity in view.identities:
        if identity.entry.spiffe_id.uri == name:
            return Certificate(name, identity)
    return None


def _bundles(view: View) -> dict[TrustDomain, Bundle]:
    """Those that Envoy takes: it refuses one without a certificate."""
    return {name: one for name, one in view.bundles.items() if one.x509_authorities}


def _coming(view: View, terms: Terms) -> set[str]:
    """The names that there will be when what is missing is signed."""
    if not view.missing:
        return set()
    return {terms.default_svid, *(one.spiffe_id.uri for one in view.missing)}


class Answers:
    """Built once each."""

    def __init__(self) -> None:
        self._made: Made[Answer] = Made()

    def of(self, found: Found) -> Answer:
        """
        Return the answer that carries what was *found*.

        Raises:
            InternalError: it would break a rule; nothing is sent.
        """
        key = tuple(secret.key for secret in found.secrets)
        return self._made.once(key, found, lambda: _answer(found))

    def __len__(self) -> int:
        return len(self._made)


def _answer(found: Found) -> Answer:
    response = discovery_pb2.DiscoveryResponse(type_url=TYPE_URL)
    content = hashlib.sha256()
    for secret in found.secrets:
        message = secret_pb2.Secret(name=secret.name)
        if isinstance(secret, Certificate):
            _put_certificate(message, secret)
        else:
            _put_roots(message, secret)
        # Before the key comes to it: a version is shown to whoever may look at an Envoy.
        content.update(message.SerializeToString(deterministic=True))
        if isinstance(secret, Certificate):
            pem = private_key_to_pem(secret.identity.svid.key)
            message.tls_certificate.private_key.inline_bytes = pem.encode()
        response.resources.add().Pack(message)
    response.version_info = content.hexdigest()[:_VERSION_DIGITS]
    return Answer(response.version_info, check_size(response.SerializeToString()))


def _put_certificate(message: Any, secret: Certificate) -> None:
    held, entry = secret.identity.svid, secret.identity.entry
    try:
        svid = X509Svid.from_chain(held.chain)
    except MalformedError as error:
        raise InternalError("an SVID would break a rule; it was not sent") from error
    if svid.spiffe_id != entry.spiffe_id:
        raise InternalError("an SVID is not that of its entry")
    pem = certificates_to_pem(svid.chain)
    message.tls_certificate.certificate_chain.inline_bytes = pem.encode()


def _put_roots(message: Any, secret: Roots) -> None:
    context = message.validation_context
    if secret.is_plain:
        if len(secret.bundles) != 1:
            raise InternalError("one trusted_ca for several trust domains (FED-43)")
        context.trusted_ca.inline_bytes = _pem_of(secret.bundles[0])
        return
    config = tls_spiffe_validator_config_pb2.SPIFFECertValidatorConfig()
    for bundle in secret.bundles:
        domain = config.trust_domains.add(name=bundle.trust_domain.name)
        domain.trust_bundle.inline_bytes = _pem_of(bundle)
    context.custom_validator_config.name = VALIDATOR
    context.custom_validator_config.typed_config.Pack(config)


def _pem_of(bundle: Bundle) -> bytes:
    return certificates_to_pem([one.der for one in bundle.x509_authorities]).encode()
