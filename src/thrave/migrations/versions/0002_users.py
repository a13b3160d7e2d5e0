"""users below an account, and their policies."""

import sqlalchemy as sa
from alembic import op

revision = '0002'
down_revision = '0001'
branch_labels = None
depends_on = None


def upgrade() -> None:

    op.create_table('iam_user',
    sa.Column('user_id', sa.String(length=32), nullable=False),
    sa.Column('account_id', sa.String(length=12), nullable=False),
    sa.Column('user_name', sa.String(length=64), nullable=False),
    sa.Column('policy_version', sa.Integer(), nullable=False),
    sa.Column('create_date', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['account_id'], ['account.account_id'], ),
    sa.PrimaryKeyConstraint('user_id')
    )
    op.create_index('iam_user_by_name', 'iam_user', ['account_id', sa.text('lower(user_name)')], unique=True)

    op.create_table('user_policy',
    sa.Column('user_id', sa.String(length=32), nullable=False),
    sa.Column('policy_name', sa.String(length=128), nullable=False),
    sa.Column('document', sa.Text(), nullable=False),
    sa.ForeignKeyConstraint(['user_id'], ['iam_user.user_id'], ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('user_id', 'policy_name')
    )
    with op.batch_alter_table('access_key', schema=None) as batch_op:
        batch_op.add_column(sa.Column('user_id', sa.String(length=32), nullable=True))
        batch_op.create_foreign_key('access_key_of_user', 'iam_user', ['user_id'], ['user_id'], ondelete='CASCADE')
        batch_op.create_index(batch_op.f('ix_access_key_user_id'), ['user_id'], unique=False)
