"""each host's own heartbeat interval and lease, and which host has adopted its tasks."""

import sqlalchemy as sa
from alembic import op

revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('host', sa.Column('heartbeat_interval', sa.Float(), nullable=False, server_default='5'))
    op.add_column('host', sa.Column('lost_after', sa.Float(), nullable=False, server_default='60'))
    op.add_column('host', sa.Column('adopted_by', sa.String(length=253), nullable=True))
