"""Creates all tables. `database.py` explains them."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = '0001'
down_revision = None
branch_labels = None
depends_on = None

_IN_PROGRESS = "(state NOT IN ('complete', 'failed'))"


def _where(condition: str) -> dict[str, Any]:
    """Return the arguments of a partial index."""
    return {'sqlite_where': sa.text(condition), 'postgresql_where': sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        'account',
        sa.Column('account_id', sa.String(length=12), nullable=False),
        sa.Column('name', sa.String(length=128), nullable=False),
        sa.Column('certificate', sa.Text()),
        sa.Column('create_date', sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint('account_id'),
        sa.UniqueConstraint('name'),
    )

    op.create_table(
        'bundle_task',
        sa.Column('bundle_id', sa.String(length=32), nullable=False),
        sa.Column('account_id', sa.String(length=12), nullable=False),
        sa.Column('owner_id', sa.String(length=12), nullable=False),
        sa.Column('instance_id', sa.String(length=32), nullable=False),
        sa.Column('host', sa.String(length=253), nullable=False),
        sa.Column('state', sa.String(length=24), nullable=False),
        sa.Column('next_step', sa.String(length=16), server_default='stop', nullable=False),
        sa.Column('progress', sa.Integer()),
        sa.Column('start_time', sa.DateTime(), nullable=False),
        sa.Column('update_time', sa.DateTime(), nullable=False),
        sa.Column('bucket', sa.String(length=255), nullable=False),
        sa.Column('prefix', sa.String(length=1024), nullable=False),
        sa.Column('access_key_id', sa.String(length=32), nullable=False),
        sa.Column('created_bucket', sa.Boolean()),
        sa.Column('encrypted_policy', sa.LargeBinary()),
        sa.Column('encrypted_bundle_key', sa.LargeBinary()),
        sa.Column('part_series', sa.String(length=12)),
        sa.Column('checkpoint', sa.JSON()),
        sa.Column('documents', sa.JSON()),
        sa.Column('earlier', sa.JSON()),
        sa.Column('manifest_sent', sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column('overlay', sa.JSON()),
        sa.Column('power_recovery_until', sa.DateTime()),
        sa.Column('run_after_task', sa.Boolean()),
        sa.Column('error_code', sa.String(length=64)),
        sa.Column('error_message', sa.Text()),
        sa.Column('warning', sa.Text()),
        sa.Column('volume_size', sa.BigInteger()),
        sa.Column('off_since', sa.DateTime()),
        sa.Column('downtime', sa.Float()),
        sa.Column('runs', sa.Integer(), server_default='0', nullable=False),
        sa.PrimaryKeyConstraint('bundle_id'),
    )
    op.create_index('bundle_task_by_account', 'bundle_task', ['account_id', 'start_time'])
    op.create_index('bundle_task_by_place', 'bundle_task', ['bucket', 'prefix'])
    op.create_index('bundle_task_by_start_time', 'bundle_task', ['start_time', 'bundle_id'])
    op.create_index('bundle_task_by_update_time', 'bundle_task', ['update_time'])
    op.create_index('bundle_task_failed', 'bundle_task', ['update_time'], **_where("state = 'failed'"))
    op.create_index('bundle_task_in_progress', 'bundle_task', ['instance_id'], unique=True, **_where(_IN_PROGRESS))
    op.create_index('bundle_task_in_progress_of_account', 'bundle_task', ['account_id'], **_where(_IN_PROGRESS))
    op.create_index('bundle_task_in_progress_on_host', 'bundle_task', ['host'], **_where(_IN_PROGRESS))
    op.create_index('bundle_task_created_bucket', 'bundle_task', ['host'], **_where('created_bucket IS NOT NULL'))
    op.create_index('bundle_task_overlay', 'bundle_task', ['host', 'instance_id'], **_where('overlay IS NOT NULL'))
    op.create_index(
        'bundle_task_place_in_progress', 'bundle_task', ['bucket', 'prefix'], unique=True, **_where(_IN_PROGRESS)
    )
    op.create_index(
        'bundle_task_power_recovery', 'bundle_task', ['host', 'instance_id'], **_where('power_recovery_until IS NOT NULL')
    )
    op.create_index(
        'bundle_task_replaces', 'bundle_task', ['host'], **_where("earlier IS NOT NULL AND state = 'complete'")
    )

    op.create_table(
        'host',
        sa.Column('host', sa.String(length=253), nullable=False),
        sa.Column('state', sa.String(length=8), nullable=False),
        sa.Column('lease', sa.String(length=32), nullable=False),
        sa.Column('version', sa.String(length=32), nullable=False),
        sa.Column('worker_concurrency', sa.Integer(), nullable=False),
        sa.Column('start_time', sa.DateTime(), nullable=False),
        sa.Column('heartbeat_time', sa.DateTime(), nullable=False),
        sa.Column('heartbeat_interval', sa.Float(), server_default='5', nullable=False),
        sa.Column('heartbeat_timeout', sa.Float(), server_default='60', nullable=False),
        sa.Column('adopted_by', sa.String(length=253)),
        sa.PrimaryKeyConstraint('host'),
    )

    op.create_table(
        'instance_power',
        sa.Column('instance_id', sa.String(length=32), nullable=False),
        sa.Column('wanted', sa.String(length=16)),
        sa.Column('request', sa.String(length=16)),
        sa.Column('version', sa.Integer(), nullable=False),
        sa.Column('asked', sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column('requested_by', sa.String(length=128)),
        sa.Column('request_time', sa.DateTime()),
        sa.Column('borrowed_by', sa.String(length=32)),
        sa.PrimaryKeyConstraint('instance_id'),
    )
    op.create_index('instance_power_borrowed', 'instance_power', ['borrowed_by'], **_where('borrowed_by IS NOT NULL'))
    op.create_index('instance_power_to_do', 'instance_power', ['instance_id'], **_where('request IS NOT NULL'))

    op.create_table(
        'vault_check',
        sa.Column('id', sa.Integer(), autoincrement=False, nullable=False),
        sa.Column('encrypted', sa.LargeBinary(), nullable=False),
        sa.Column('identity', sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint('id'),
    )

    op.create_table(
        'bundle_part',
        sa.Column('bucket', sa.String(length=255), nullable=False),
        sa.Column('key', sa.String(length=1024), nullable=False),
        sa.Column('bundle_id', sa.String(length=32), nullable=False),
        sa.Column('state', sa.String(length=8), nullable=False),
        sa.Column('sender', sa.String(length=16)),
        sa.Column('settle_time', sa.DateTime()),
        sa.Column('size', sa.BigInteger()),
        sa.Column('etag', sa.String(length=64)),
        sa.Column('part', sa.JSON()),
        sa.ForeignKeyConstraint(['bundle_id'], ['bundle_task.bundle_id']),
        sa.PrimaryKeyConstraint('bucket', 'key'),
    )
    op.create_index(
        'bundle_part_to_be_deleted', 'bundle_part', ['bundle_id'], **_where("state IN ('unwanted', 'gone')")
    )
    op.create_index('ix_bundle_part_bundle_id', 'bundle_part', ['bundle_id'])

    op.create_table(
        'bundle_task_event',
        sa.Column('event_id', sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), nullable=False),
        sa.Column('bundle_id', sa.String(length=32), nullable=False),
        sa.Column('time', sa.DateTime(), nullable=False),
        sa.Column('state', sa.String(length=24), nullable=False),
        sa.Column('message', sa.Text()),
        sa.ForeignKeyConstraint(['bundle_id'], ['bundle_task.bundle_id'], ondelete='CASCADE'),
        sa.PrimaryKeyConstraint('event_id'),
    )
    op.create_index('ix_bundle_task_event_bundle_id', 'bundle_task_event', ['bundle_id'])

    op.create_table(
        'iam_user',
        sa.Column('user_id', sa.String(length=32), nullable=False),
        sa.Column('account_id', sa.String(length=12), nullable=False),
        sa.Column('user_name', sa.String(length=64), nullable=False),
        sa.Column('policy_version', sa.Integer(), nullable=False),
        sa.Column('create_date', sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(['account_id'], ['account.account_id']),
        sa.PrimaryKeyConstraint('user_id'),
    )
    op.create_index('iam_user_by_name', 'iam_user', ['account_id', sa.text('lower(user_name)')], unique=True)

    op.create_table(
        'instance',
        sa.Column('instance_id', sa.String(length=32), nullable=False),
        sa.Column('host', sa.String(length=253), nullable=False),
        sa.Column('account_id', sa.String(length=12), nullable=False),
        sa.Column('state', sa.String(length=16), nullable=False),
        sa.Column('document', sa.JSON(), nullable=False),
        sa.Column('report_time', sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(['host'], ['host.host'], ondelete='CASCADE'),
        sa.PrimaryKeyConstraint('instance_id'),
    )
    op.create_index('ix_instance_account_id', 'instance', ['account_id'])
    op.create_index('ix_instance_host', 'instance', ['host'])

    op.create_table(
        'access_key',
        sa.Column('access_key_id', sa.String(length=32), nullable=False),
        sa.Column('account_id', sa.String(length=12), nullable=False),
        sa.Column('user_id', sa.String(length=32)),
        sa.Column('encrypted_secret', sa.LargeBinary(), nullable=False),
        sa.Column('status', sa.String(length=8), nullable=False),
        sa.Column('create_date', sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(['account_id'], ['account.account_id']),
        sa.ForeignKeyConstraint(['user_id'], ['iam_user.user_id'], ondelete='CASCADE'),
        sa.PrimaryKeyConstraint('access_key_id'),
    )
    op.create_index('ix_access_key_account_id', 'access_key', ['account_id'])
    op.create_index('ix_access_key_user_id', 'access_key', ['user_id'])

    op.create_table(
        'user_policy',
        sa.Column('user_id', sa.String(length=32), nullable=False),
        sa.Column('policy_name', sa.String(length=128), nullable=False),
        sa.Column('document', sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(['user_id'], ['iam_user.user_id'], ondelete='CASCADE'),
        sa.PrimaryKeyConstraint('user_id', 'policy_name'),
    )
