"""For which pod an SVID was issued."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("issued", sa.Column("pod_uid", sa.Text(), nullable=False, server_default=""))


def downgrade() -> None:
    raise RuntimeError("restore the backup taken before the upgrade")
