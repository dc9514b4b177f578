"""
Which files the settings ask for, made of what the agent has said: no clock and no agent.

It is made in parts.  A part that cannot be made (an entry was deleted, an identity is not
there yet) holds up nothing but the first set: later the other parts go on being renewed.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TypeAlias

from spiffe_core.bundle import BundleSet
from spiffe_core.errors import NotReadyError, PreconditionError
from spiffe_core.jwtsvid import JwtSvid
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from workload_api.client.client import X509Context, X509Identity
from workload_api.sidecar import formats
from workload_api.sidecar.config import (
    JwtFile,
    Kind,
    SidecarSettings,
    WhenDenied,
    X509Files,
)
from workload_api.sidecar.files import File
from workload_api.sidecar.formats import Password

_Sealed: TypeAlias = dict[Hashable, dict[str, File]]


class UnsaidError(NotReadyError):
    """The agent has not said anything of it yet."""


@dataclass(slots=True)
class Known:
    """What the agent said last; None is what it has not said yet, or said that we may not."""

    x509: X509Context | None = None
    jwt_bundles: BundleSet | None = None
    tokens: dict[JwtFile, JwtSvid] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Part:
    """Files that are made of one thing, and when that expires."""

    kind: Kind
    files: Mapping[str, File]
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class FileSet:
    """All files, in parts by what each is made of."""

    parts: Mapping[str, Part]
    problems: tuple[str, ...] = ()
    """Why parts are missing, or are as they were before."""
    is_answered: bool = True
    """The agent has answered what was asked; a problem is its answer, or comes of it."""

    @property
    def files(self) -> dict[str, File]:
        """Every file by its name."""
        return {name: file for part in self.parts.values() for name, file in part.files.items()}

    @property
    def expires_at(self) -> datetime | None:
        """When the first of them is of no use any more."""
        ends = (one.expires_at for one in self.parts.values())
        return min((one for one in ends if one is not None), default=None)

    def changes_from(self, before: "FileSet | None") -> frozenset[Kind]:
        """Return the kinds of which a file is new, gone or another."""
        old = before.parts if before else {}
        return frozenset(
            part.kind
            for name, part in {**old, **self.parts}.items()
            if _files_of(old, name) != _files_of(self.parts, name)
        )


class Plan:
    """What is to be written, by the settings."""

    def __init__(self, settings: SidecarSettings) -> None:
        self.settings = settings
        self._modes = settings.files.modes()
        # Sealing draws a salt: the same SVID sealed twice would pass for another one.
        self._sealed: _Sealed = {}
        self._sealed_before: _Sealed = {}

    @property
    def needs_x509(self) -> bool:
        """FetchX509SVID is to be followed."""
        return bool(self.settings.x509) or self.settings.bundles.x509

    @property
    def needs_jwt_bundles(self) -> bool:
        """FetchJWTBundles is to be followed."""
        return self.settings.bundles.jwt

    def files(self, known: Known, at: datetime, before: FileSet | None = None) -> FileSet:
        """
        Return every file; of a part that is not there, those of *before* if they are kept.

        Raises:
            PreconditionError: the password cannot be read, or two files have one name.
        """
        self._sealed_before, self._sealed = self._sealed, {}
        parts: dict[str, Part] = {}
        problems: list[str] = []
        answered = True
        keep = self.settings.when_denied is WhenDenied.KEEP
        for name, make in self._parts(known, at):
            try:
                parts[name] = make()
            except NotReadyError as error:
                problems.append(str(error))
                answered = answered and not isinstance(error, UnsaidError)
                if before is not None and keep and name in before.parts:
                    parts[name] = before.parts[name]
        names = [name for part in parts.values() for name in part.files]
        for name in names:
            if names.count(name) > 1:
                raise PreconditionError(f"two files would be called {name}: rename one")
        return FileSet(parts, tuple(dict.fromkeys(problems)), answered)

    def _parts(self, known: Known, at: datetime) -> Iterator[tuple[str, Callable[[], Part]]]:
        for number, wanted in enumerate(self.settings.x509):
            yield f"x509 {number}", partial(self._svid, wanted, known)
            if wanted.bundle_file:
                yield f"bundle {number}", partial(self._own_bundle, wanted, known, at)
        if self.needs_x509:
            yield "bundles", partial(self._bundles, known, at)
        if self.needs_jwt_bundles:
            yield "jwks", partial(self._jwks, known)
        for number, each in enumerate(self.settings.jwt):
            yield f"jwt {number}", partial(self._token, each, known)

    def _svid(self, wanted: X509Files, known: Known) -> Part:
        one = picked_of(wanted, _context_of(known).identities)
        made: dict[str, File] = {}
        if wanted.pem:
            names = {
                f"{wanted.name}.pem": wanted.certificate_file,
                f"{wanted.name}.key": wanted.key_file,
            }
            files = formats.svid_pem(
                wanted.name, one, self._modes, leaf_alone=self.settings.bundles.intermediates
            )
            made |= {names[name] or name: file for name, file in files.items()}
        if wanted.combined:
            made |= formats.svid_combined(wanted.name, one, self._modes)
        if wanted.pkcs12:
            password = self._password()
            seal = partial(formats.svid_pkcs12, wanted.name, one, password, self._modes)
            made |= self._once((wanted.name, one, password), seal)
        return Part(Kind.X509, made, one.svid.validity.not_after)

    def _own_bundle(self, wanted: X509Files, known: Known, at: datetime) -> Part:
        one = picked_of(wanted, _context_of(known).identities)
        name = f"bundle.{one.svid.spiffe_id.trust_domain}.pem"
        # Nothing is trusted where the agent has sent no bundle.
        file = self._pem(known, at).get(name, File(b"", self._modes.bundle))
        return Part(Kind.BUNDLES, {wanted.bundle_file: file})

    def _bundles(self, known: Known, at: datetime) -> Part:
        how, bundles = self.settings.bundles, self._of_x509(known)
        valid_at = self._valid_at(at)
        pem = self._pem(known, at)
        made = dict(pem) if how.x509 else {}
        if how.x509 and any(one.pkcs12 for one in self.settings.x509):
            password = self._password()
            seal = partial(
                formats.bundles_pkcs12, bundles, password, self._modes, valid_at=valid_at
            )
            made |= self._once(
                (tuple(sorted((n, f.content) for n, f in pem.items())), password), seal
            )
        if how.unsafe_merged_file:
            made |= formats.bundles_merged(
                how.unsafe_merged_file, bundles, self._modes, valid_at=valid_at
            )
        return Part(Kind.BUNDLES, made)

    def _pem(self, known: Known, at: datetime) -> dict[str, File]:
        identities = (
            _context_of(known).identities if self.settings.bundles.intermediates else ()
        )
        return formats.bundles_pem(
            self._of_x509(known),
            self._modes,
            valid_at=self._valid_at(at),
            intermediates=identities,
        )

    def _of_x509(self, known: Known) -> BundleSet:
        context = _context_of(known)
        if self.settings.bundles.federated:
            return context.bundles
        return _only(
            context.bundles, {one.svid.spiffe_id.trust_domain for one in context.identities}
        )

    def _valid_at(self, at: datetime) -> datetime | None:
        return at if self.settings.bundles.omit_expired else None

    def _jwks(self, known: Known) -> Part:
        bundles = known.jwt_bundles
        if bundles is None:
            raise UnsaidError("waiting for the JWT bundles")
        if not self.settings.bundles.federated:
            own = {one.spiffe_id.trust_domain for one in known.tokens.values()}
            if known.x509 is not None:
                own |= {one.svid.spiffe_id.trust_domain for one in known.x509.identities}
            if not own:
                raise UnsaidError("waiting to learn which trust domain is ours")
            bundles = _only(bundles, own)
        return Part(Kind.BUNDLES, formats.bundles_jwks(bundles, self._modes))

    def _token(self, wanted: JwtFile, known: Known) -> Part:
        token = known.tokens.get(wanted)
        if token is None:
            raise UnsaidError(f"waiting for a JWT-SVID for {', '.join(wanted.audience)}")
        file = formats.jwt_file(wanted.file_name, token, self._modes)
        return Part(Kind.JWT, file, token.expires_at)

    def _password(self) -> Password:
        """Read anew for each set: a password may be rotated too."""
        assert self.settings.pkcs12_password_file is not None  # noqa: S101 the settings see to it
        return Password.from_file(self.settings.pkcs12_password_file)

    def _once(self, key: Hashable, make: Callable[[], dict[str, File]]) -> dict[str, File]:
        self._sealed[key] = self._sealed_before.get(key) or make()
        return self._sealed[key]


def picked_of(wanted: X509Files, identities: tuple[X509Identity, ...]) -> X509Identity:
    """
    Return the identity that *wanted* names.

    Raises:
        NotReadyError: none of ours is that one.
    """
    if wanted.spiffe_id:
        spiffe_id = SpiffeId.parse(wanted.spiffe_id)
        found = [one for one in identities if one.svid.spiffe_id == spiffe_id]
        what = f"the identity {spiffe_id}"
    elif wanted.hint:
        found = [one for one in identities if one.hint == wanted.hint]
        what = f'an identity with the hint "{wanted.hint}"'
    else:
        return identities[0]  # WAPI-56: the first is the default
    if not found:
        there = ", ".join(one.svid.spiffe_id.uri for one in identities)
        raise NotReadyError(f"waiting for {what}; the agent gives us {there}")
    return found[0]


def _context_of(known: Known) -> X509Context:
    if known.x509 is None:
        raise UnsaidError("waiting for an X509-SVID")
    return known.x509


def _only(bundles: BundleSet, domains: set[TrustDomain]) -> BundleSet:
    return BundleSet.of(one for name, one in bundles.items() if name in domains)


def _files_of(parts: Mapping[str, Part], name: str) -> Mapping[str, File]:
    return parts[name].files if name in parts else {}
