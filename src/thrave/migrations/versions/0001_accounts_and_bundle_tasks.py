"""accounts and bundle tasks."""

import sqlalchemy as sa
from alembic import op

revision = '0001'
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:

    op.create_table('account',
    sa.Column('account_id', sa.String(length=12), nullable=False),
    sa.Column('name', sa.String(length=128), nullable=False),
    sa.Column('certificate', sa.Text(), nullable=True),
    sa.Column('create_date', sa.DateTime(), nullable=False),
    sa.PrimaryKeyConstraint('account_id'),
    sa.UniqueConstraint('name')
    )
    op.create_table('bundle_task',
    sa.Column('bundle_id', sa.String(length=32), nullable=False),
    sa.Column('account_id', sa.String(length=12), nullable=False),
    sa.Column('owner_id', sa.String(length=12), nullable=False),
    sa.Column('instance_id', sa.String(length=32), nullable=False),
    sa.Column('host', sa.String(length=253), nullable=False),
    sa.Column('state', sa.String(length=24), nullable=False),
    sa.Column('progress', sa.Integer(), nullable=True),
    sa.Column('start_time', sa.DateTime(), nullable=False),
    sa.Column('update_time', sa.DateTime(), nullable=False),
    sa.Column('bucket', sa.String(length=255), nullable=False),
    sa.Column('prefix', sa.String(length=1024), nullable=False),
    sa.Column('access_key_id', sa.String(length=32), nullable=False),
    sa.Column('sealed_grant', sa.LargeBinary(), nullable=True),
    sa.Column('sealed_secrets', sa.LargeBinary(), nullable=True),
    sa.Column('checkpoint', sa.JSON(), nullable=True),
    sa.Column('look_after_until', sa.DateTime(), nullable=True),
    sa.Column('was_running', sa.Boolean(), nullable=True),
    sa.Column('error_code', sa.String(length=64), nullable=True),
    sa.Column('error_message', sa.Text(), nullable=True),
    sa.PrimaryKeyConstraint('bundle_id')
    )
    with op.batch_alter_table('bundle_task', schema=None) as batch_op:
        batch_op.create_index('bundle_task_by_account', ['account_id', 'start_time'], unique=False)
        batch_op.create_index('bundle_task_in_progress', ['instance_id'], unique=True, sqlite_where=sa.text("(state NOT IN ('complete', 'failed'))"), postgresql_where=sa.text("(state NOT IN ('complete', 'failed'))"))

    op.create_table('access_key',
    sa.Column('access_key_id', sa.String(length=32), nullable=False),
    sa.Column('account_id', sa.String(length=12), nullable=False),
    sa.Column('sealed_secret', sa.LargeBinary(), nullable=False),
    sa.Column('status', sa.String(length=8), nullable=False),
    sa.Column('create_date', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['account_id'], ['account.account_id'], ),
    sa.PrimaryKeyConstraint('access_key_id')
    )
    with op.batch_alter_table('access_key', schema=None) as batch_op:
        batch_op.create_index(batch_op.f('ix_access_key_account_id'), ['account_id'], unique=False)

    op.create_table('bundle_part',
    sa.Column('bundle_id', sa.String(length=32), nullable=False),
    sa.Column('key', sa.String(length=1024), nullable=False),
    sa.Column('size', sa.BigInteger(), nullable=True),
    sa.Column('part', sa.JSON(), nullable=True),
    sa.ForeignKeyConstraint(['bundle_id'], ['bundle_task.bundle_id'], ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('bundle_id', 'key')
    )

