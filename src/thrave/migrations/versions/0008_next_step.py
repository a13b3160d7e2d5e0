"""the step of a task that comes next, and its error before anything is undone."""

import sqlalchemy as sa
from alembic import op

revision = '0008'
down_revision = '0007'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        'bundle_task', sa.Column('next_step', sa.String(length=16), nullable=False, server_default='stop')
    )
    # Every step can be repeated: a task under way goes on with the first that may be unfinished.
    op.execute("UPDATE bundle_task SET next_step = 'seal' WHERE state IN ('bundling', 'storing')")
    op.execute(
        "UPDATE bundle_task SET next_step = 'undo-start', error_code = 'Client.Cancelled', "
        "error_message = 'User has requested bundling operation cancellation' WHERE state = 'cancelling'"
    )
