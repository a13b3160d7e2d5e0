"""one unfinished task for each bucket and prefix, names of parts, and bundles that are replaced."""

import sqlalchemy as sa
from alembic import op

revision = '0005'
down_revision = '0004'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('bundle_task', sa.Column('part_series', sa.String(length=12), nullable=True))
    op.add_column('bundle_task', sa.Column('earlier', sa.JSON(), nullable=True))
    op.add_column(
        'bundle_task', sa.Column('manifest_sent', sa.Boolean(), nullable=False, server_default=sa.false())
    )
    unfinished = sa.text("state NOT IN ('complete', 'failed')")
    op.create_index(
        'bundle_task_place_in_progress', 'bundle_task', ['bucket', 'prefix'], unique=True,
        sqlite_where=unfinished, postgresql_where=unfinished,
    )
    op.create_index('bundle_task_by_place', 'bundle_task', ['bucket', 'prefix'])
    replaces = sa.text("earlier IS NOT NULL AND state = 'complete'")
    op.create_index(
        'bundle_task_replaces', 'bundle_task', ['host'], sqlite_where=replaces, postgresql_where=replaces
    )
