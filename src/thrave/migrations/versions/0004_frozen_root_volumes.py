"""root volumes that are frozen while their instances run on overlays, and buckets that requests created."""

import sqlalchemy as sa
from alembic import op

revision = '0004'
down_revision = '0003'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('bundle_task', sa.Column('frozen', sa.JSON(), nullable=True))
    frozen = sa.text('frozen IS NOT NULL')
    op.create_index(
        'bundle_task_frozen', 'bundle_task', ['host', 'instance_id'], sqlite_where=frozen, postgresql_where=frozen
    )
    op.add_column('bundle_task', sa.Column('made_bucket', sa.Boolean(), nullable=True))
    made = sa.text('made_bucket IS NOT NULL')
    op.create_index('bundle_task_made_bucket', 'bundle_task', ['host'], sqlite_where=made, postgresql_where=made)
