"""hosts and what they report; what happened to a task; what going on after a take-over takes."""

import sqlalchemy as sa
from alembic import op

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None

number = sa.BigInteger().with_variant(sa.Integer, 'sqlite')


def upgrade() -> None:

    op.create_table('host',
    sa.Column('host', sa.String(length=253), nullable=False),
    sa.Column('state', sa.String(length=8), nullable=False),
    sa.Column('lease', sa.String(length=32), nullable=False),
    sa.Column('version', sa.String(length=32), nullable=False),
    sa.Column('tasks_at_once', sa.Integer(), nullable=False),
    sa.Column('start_time', sa.DateTime(), nullable=False),
    sa.Column('heartbeat_time', sa.DateTime(), nullable=False),
    sa.PrimaryKeyConstraint('host')
    )

    op.create_table('instance',
    sa.Column('instance_id', sa.String(length=32), nullable=False),
    sa.Column('host', sa.String(length=253), nullable=False),
    sa.Column('account_id', sa.String(length=12), nullable=False),
    sa.Column('state', sa.String(length=16), nullable=False),
    sa.Column('document', sa.JSON(), nullable=False),
    sa.Column('report_time', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['host'], ['host.host'], ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('instance_id')
    )
    op.create_index('ix_instance_host', 'instance', ['host'])
    op.create_index('ix_instance_account_id', 'instance', ['account_id'])

    op.create_table('power_request',
    sa.Column('request_id', number, nullable=False),
    sa.Column('host', sa.String(length=253), nullable=False),
    sa.Column('instance_id', sa.String(length=32), nullable=False),
    sa.Column('action', sa.String(length=16), nullable=False),
    sa.Column('request_time', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['host'], ['host.host'], ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('request_id')
    )
    op.create_index('ix_power_request_host', 'power_request', ['host'])

    op.create_table('vault_proof',
    sa.Column('only', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('sealed', sa.LargeBinary(), nullable=False),
    sa.Column('identity', sa.String(length=64), nullable=False),
    sa.PrimaryKeyConstraint('only')
    )

    op.create_table('bundle_task_event',
    sa.Column('event_id', number, nullable=False),
    sa.Column('bundle_id', sa.String(length=32), nullable=False),
    sa.Column('time', sa.DateTime(), nullable=False),
    sa.Column('state', sa.String(length=24), nullable=False),
    sa.Column('message', sa.Text(), nullable=True),
    sa.ForeignKeyConstraint(['bundle_id'], ['bundle_task.bundle_id'], ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('event_id')
    )
    op.create_index('ix_bundle_task_event_bundle_id', 'bundle_task_event', ['bundle_id'])

    # One by one, not in a batch: a batch would copy the table, and could not keep the partial indexes on SQLite.
    for column in (
        sa.Column('documents', sa.JSON(), nullable=True),
        sa.Column('notice', sa.Text(), nullable=True),
        sa.Column('volume_size', sa.BigInteger(), nullable=True),
        sa.Column('attempts', sa.Integer(), nullable=False, server_default='0'),
    ):
        op.add_column('bundle_task', column)
    op.add_column('bundle_part', sa.Column('etag', sa.String(length=64), nullable=True))
    op.create_index('bundle_task_by_start_time', 'bundle_task', ['start_time', 'bundle_id'])
    op.create_index('bundle_task_by_update_time', 'bundle_task', ['update_time'])
    in_progress = sa.text("state NOT IN ('complete', 'failed')")
    op.create_index('bundle_task_in_progress_on_host', 'bundle_task', ['host'],
                    sqlite_where=in_progress, postgresql_where=in_progress)
    op.create_index('bundle_task_in_progress_of_account', 'bundle_task', ['account_id'],
                    sqlite_where=in_progress, postgresql_where=in_progress)
    failed = sa.text("state = 'failed'")
    op.create_index('bundle_task_failed', 'bundle_task', ['update_time'],
                    sqlite_where=failed, postgresql_where=failed)
    looked_after = sa.text('look_after_until IS NOT NULL')
    op.create_index('bundle_task_looked_after', 'bundle_task', ['host', 'instance_id'],
                    sqlite_where=looked_after, postgresql_where=looked_after)
    # Manifest and side file were kept by the engine, as a step's result; now they stand in the task. Sealing, which
    # goes on at the end of what is stored, makes them again.
    op.execute("UPDATE bundle_task SET state = 'bundling' WHERE state = 'storing'")
