"""what is wanted of each instance's power, in a row of its own."""

import sqlalchemy as sa
from alembic import op

revision = '0007'
down_revision = '0006'
branch_labels = None
depends_on = None

# What is still to be done becomes the row of its instance: the last request wins.
_REQUESTS = """
INSERT INTO instance_power (instance_id, wanted, request, version, asked, request_time)
SELECT instance_id,
       CASE action WHEN 'stop' THEN 'stopped' WHEN 'terminate' THEN 'terminated' ELSE 'running' END,
       action, 1, false, request_time
FROM power_request
WHERE request_id IN (SELECT max(request_id) FROM power_request GROUP BY instance_id)
"""
# An unfinished task keeps its instance off until it has read its volume, unless that runs on an overlay meanwhile.
_UNFINISHED = """
INSERT INTO instance_power (instance_id, wanted, version, asked)
SELECT instance_id, CASE WHEN was_running THEN 'running' ELSE 'stopped' END, 1, false
FROM bundle_task
WHERE state NOT IN ('complete', 'failed') AND was_running IS NOT NULL
      AND instance_id NOT IN (SELECT instance_id FROM instance_power)
"""
_BORROWED = """
UPDATE instance_power
SET borrowed_by = (SELECT bundle_id FROM bundle_task WHERE bundle_task.instance_id = instance_power.instance_id
                   AND state NOT IN ('complete', 'failed') AND was_running IS NOT NULL
                   AND (frozen IS NULL OR state NOT IN ('bundling', 'storing')))
"""
# An instance that is looked after is to run if it did before its task.
_LOOKED_AFTER = """
INSERT INTO instance_power (instance_id, wanted, version, asked)
SELECT DISTINCT instance_id, 'running', 1, false
FROM bundle_task
WHERE look_after_until IS NOT NULL AND was_running
      AND instance_id NOT IN (SELECT instance_id FROM instance_power)
"""


def upgrade() -> None:
    op.create_table(
        'instance_power',
        sa.Column('instance_id', sa.String(length=32), nullable=False),
        sa.Column('wanted', sa.String(length=16), nullable=True),
        sa.Column('request', sa.String(length=16), nullable=True),
        sa.Column('version', sa.Integer(), nullable=False),
        sa.Column('asked', sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column('requested_by', sa.String(length=128), nullable=True),
        sa.Column('request_time', sa.DateTime(), nullable=True),
        sa.Column('borrowed_by', sa.String(length=32), nullable=True),
        sa.PrimaryKeyConstraint('instance_id'),
    )
    for name, column in (('instance_power_to_do', 'request'), ('instance_power_borrowed', 'borrowed_by')):
        there = sa.text(f"{column} IS NOT NULL")
        op.create_index(
            name, 'instance_power', ['instance_id' if column == 'request' else column],
            sqlite_where=there, postgresql_where=there,
        )
    for statement in (_REQUESTS, _UNFINISHED, _BORROWED, _LOOKED_AFTER):
        op.execute(statement)
    op.drop_table('power_request')
