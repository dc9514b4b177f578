"""Our own bundle, and foreign ones that were exchanged by hand (SPIRE API 5.4)."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

from issuer.services.hub import Hub
from issuer.services.paging import Page, collect
from issuer.store.store import Repositories, Store
from spiffe_core.bundle import Bundle
from spiffe_core.errors import (
    AlreadyExistsError,
    MalformedError,
    NotFoundError,
    PreconditionError,
)
from spiffe_core.spiffeid import TrustDomain


class DeleteMode(enum.Enum):
    """What becomes of entries that federate with a bundle that goes."""

    RESTRICT = 0
    DELETE = 1
    DISSOCIATE = 2


@dataclass(frozen=True)
class BundleService:
    """Reads and changes bundles.  One per process, safe to share."""

    store: Store
    hub: Hub
    trust_domain: TrustDomain

    def own(self) -> Bundle:
        """Return our own bundle: anybody may ask, so it costs no look into the store."""
        return self.hub.bundle

    async def foreign(self, trust_domain: TrustDomain) -> Bundle:
        """
        Return a foreign bundle.

        Raises:
            MalformedError: it is our own trust domain.
            NotFoundError: there is none.
        """
        self._refuse_own(trust_domain, "getting")
        found = await self.store.read(lambda repos: repos.bundles.find(trust_domain))
        if found is None:
            raise NotFoundError("bundle not found")
        return found

    async def page(self, page_size: int, token: str) -> Page[Bundle]:
        """Return one page of foreign bundles."""
        return await self.store.read(
            lambda repos: collect(repos.bundles.page, lambda _: True, page_size, token)
        )

    async def count(self) -> int:
        """Return how many bundles there are, our own included."""
        return 1 + await self.store.read(lambda repos: repos.bundles.count())

    async def create(self, bundle: Bundle, *, actor: str) -> Bundle:
        """
        Add a foreign bundle.

        Raises:
            MalformedError: it is our own trust domain's.
            AlreadyExistsError: there is one.
        """

        def make(before: Bundle | None) -> Bundle:
            if before is not None:
                raise AlreadyExistsError("bundle already exists")
            return bundle

        return await self._put(bundle.trust_domain, make, "creating", actor)

    async def update(
        self, trust_domain: TrustDomain, change: Callable[[Bundle], Bundle], *, actor: str
    ) -> Bundle:
        """
        Replace a foreign bundle by what *change* makes of it, inside the transaction.

        Raises:
            MalformedError: it is our own trust domain's.
            NotFoundError: there is none.
        """

        def make(before: Bundle | None) -> Bundle:
            if before is None:
                raise NotFoundError("bundle not found")
            return change(before)

        return await self._put(trust_domain, make, "updating", actor)

    async def set(self, bundle: Bundle, *, actor: str) -> Bundle:
        """
        Add or replace a foreign bundle.

        Raises:
            MalformedError: it is our own trust domain's.
        """
        return await self._put(bundle.trust_domain, lambda _: bundle, "setting", actor)

    async def delete(self, trust_domain: TrustDomain, mode: DeleteMode, *, actor: str) -> None:
        """
        Remove a foreign bundle, and do to the entries that use it what *mode* says.

        Raises:
            NotFoundError: there is none.
            PreconditionError: entries still use it, and *mode* is RESTRICT.
        """
        if trust_domain == self.trust_domain:
            raise MalformedError(
                "removing the bundle for the server trust domain is not allowed"
            )

        def work(repos: Repositories) -> None:
            using = repos.entries.federating_with(trust_domain.name)
            if using and mode is DeleteMode.RESTRICT:
                raise PreconditionError(
                    "failed to delete federated bundle: cannot delete bundle; federated with "
                    f"{len(using)} registration entries"
                )
            for entry in using:
                if mode is DeleteMode.DELETE:
                    repos.entries.delete(entry.id)
                    repos.audit.add("entry.delete", entry.id)
                else:
                    left = entry.federates_with - {trust_domain}
                    repos.entries.update(replace(entry, federates_with=left))
                    repos.audit.add("entry.update", entry.id)
            repos.bundles.delete(trust_domain)
            repos.audit.add("bundle.delete", trust_domain.name, mode.name.lower())

        await self.store.write(work, actor=actor)

    async def _put(
        self,
        trust_domain: TrustDomain,
        make: Callable[[Bundle | None], Bundle],
        verb: str,
        actor: str,
    ) -> Bundle:
        self._refuse_own(trust_domain, verb)

        def work(repos: Repositories) -> Bundle:
            made = make(repos.bundles.find(trust_domain))
            repos.bundles.set(made)
            repos.audit.add("bundle.set", trust_domain.name)
            return made

        return await self.store.write(work, actor=actor)

    def _refuse_own(self, trust_domain: TrustDomain, verb: str) -> None:
        if trust_domain == self.trust_domain:
            raise MalformedError(
                f"{verb} a federated bundle for the server's own trust domain is not allowed"
            )
