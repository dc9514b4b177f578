"""
Bring a database to this release's schema, or refuse it with the reason.

Source: SEC-95 (newer schema, other trust domain), layout fact 7 (where the migrations are).
"""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, insert, inspect, select, text

from issuer.store.tables import meta
from spiffe_core.bundle import DEFAULT_REFRESH_HINT
from spiffe_core.crashpoints import crash_point
from spiffe_core.errors import PreconditionError
from spiffe_core.spiffeid import TrustDomain

MIGRATION_SECONDS: Final = 600.0  # a statement; a large table takes its time
_PACKAGED: Final = Path(__file__).parent.parent / "_migrations"
_IN_TREE: Final = Path(__file__).parents[2] / "migrations"


@dataclass(frozen=True, slots=True)
class SchemaStatus:
    """Where a database is, and where this release wants it."""

    current: str | None
    wanted: str

    @property
    def is_current(self) -> bool:
        """True when there is nothing to do."""
        return self.current == self.wanted


def locate() -> Path:
    """Return the folder of the migrations: in the wheel, or in the tree."""
    return _PACKAGED if _PACKAGED.is_dir() else _IN_TREE


def revisions() -> list[str]:
    """Return the numbers of all migrations, the first one first; file names begin with them."""
    return sorted(one.name[:4] for one in (locate() / "versions").glob("[0-9]*.py"))


def status(engine: Engine) -> SchemaStatus:
    """
    Compare the database with this release.

    Raises:
        PreconditionError: the database names several schemas.
    """
    with engine.connect() as connection:
        return SchemaStatus(_current(connection), revisions()[-1])


def upgrade(engine: Engine) -> SchemaStatus:
    """
    Take every step that is missing; each is one transaction.

    Raises:
        PreconditionError: the database is of a newer release.
    """
    before = status(engine)
    if before.current is not None and before.current not in revisions():
        raise PreconditionError(
            f"the database has schema {before.current}, newer than this release's "
            f"{before.wanted}: run the newer release, or restore an older backup"
        )
    if not before.is_current:
        _take_steps(engine)
    return status(engine)


def _take_steps(engine: Engine) -> None:
    # Here and not above: most starts have no step to take, and Alembic is a third of what
    # the server loads.
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(locate()).replace("%", "%%"))
    steps = engine.execution_options(seconds=MIGRATION_SECONDS)
    try:
        with steps.begin() as connection:
            config.attributes["connection"] = connection
            crash_point("migration.started")
            command.upgrade(config, "head")
            crash_point("migration.before_commit")
    except CommandError as error:
        raise PreconditionError("the migrations of this release cannot be run") from error
    crash_point("migration.committed")


def _current(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
    if len(found) > 1:
        raise PreconditionError("the database names several schemas: restore a backup")
    return str(found[0]) if found else None


def claim(engine: Engine, trust_domain: TrustDomain, path: Path) -> None:
    """
    Mark a new database with *trust_domain*, or see that it is that domain's.

    Raises:
        PreconditionError: it belongs to another.
    """
    with engine.begin() as connection:
        owner = connection.execute(select(meta.c.trust_domain)).scalar()
        if owner is None:
            hint = int(DEFAULT_REFRESH_HINT.total_seconds())
            connection.execute(
                insert(meta).values(
                    id=1,
                    trust_domain=trust_domain.name,
                    bundle_sequence=0,
                    refresh_hint=hint,
                    epoch=new_epoch(),
                )
            )
            crash_point("migration.claimed")
        elif owner != trust_domain.name:
            raise PreconditionError(
                f"{path} belongs to trust domain {owner}, the settings name {trust_domain}: "
                "a trust domain can't be renamed; set `trust_domain` back, or use a new "
                "`data_dir`"
            )


def new_epoch() -> str:
    """Return a name for a stretch of history that no restore has cut."""
    return secrets.token_hex(16)
