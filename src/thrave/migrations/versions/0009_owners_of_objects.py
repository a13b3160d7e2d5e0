"""one owner for each object in a bucket."""

import sqlalchemy as sa
from alembic import op

revision = '0009'
down_revision = '0008'
branch_labels = None
depends_on = None

_UNFINISHED = "t.state NOT IN ('complete', 'failed')"


def upgrade() -> None:
    op.create_table(
        'bundle_object',
        sa.Column('bucket', sa.String(length=255), nullable=False),
        sa.Column('key', sa.String(length=1024), nullable=False),
        sa.Column('bundle_id', sa.String(length=32), nullable=False),
        sa.Column('state', sa.String(length=8), nullable=False),
        sa.Column('run', sa.String(length=16), nullable=True),
        sa.Column('settle_time', sa.DateTime(), nullable=True),
        sa.Column('size', sa.BigInteger(), nullable=True),
        sa.Column('etag', sa.String(length=64), nullable=True),
        sa.Column('part', sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(['bundle_id'], ['bundle_task.bundle_id']),
        sa.PrimaryKeyConstraint('bucket', 'key'),
    )
    # Several tasks may have written one key: an unfinished task owns it, else the newest.
    op.execute(f"""
        INSERT INTO bundle_object (bucket, key, bundle_id, state, run, size, etag, part)
        SELECT bucket, key, bundle_id, state, run, size, etag, part FROM (
            SELECT t.bucket, p.key, p.bundle_id, p.size, p.etag, p.part,
                CASE t.state WHEN 'failed' THEN 'unwanted' ELSE 'sent' END AS state,
                CASE WHEN p.size IS NULL AND t.state <> 'complete' THEN 'before' END AS run,
                ROW_NUMBER() OVER (
                    PARTITION BY t.bucket, p.key
                    ORDER BY CASE WHEN {_UNFINISHED} THEN 0 ELSE 1 END, t.start_time DESC, t.bundle_id DESC
                ) AS place
            FROM bundle_part p JOIN bundle_task t ON t.bundle_id = p.bundle_id
        ) AS written WHERE place = 1
    """)  # noqa: S608 (a constant)
    op.drop_table('bundle_part')
    op.rename_table('bundle_object', 'bundle_part')
    op.create_index('ix_bundle_part_bundle_id', 'bundle_part', ['bundle_id'])
    unwanted = sa.text("state IN ('unwanted', 'gone')")
    op.create_index(
        'bundle_part_to_be_deleted', 'bundle_part', ['bundle_id'], sqlite_where=unwanted, postgresql_where=unwanted
    )
    _claim_replaced_bundles()


def _claim_replaced_bundles() -> None:
    """Give a complete task the objects that it still has to delete of the bundle that it has replaced."""
    connection = op.get_bind()
    task = sa.table('bundle_task', *(sa.column(name) for name in ('bundle_id', 'bucket', 'state', 'start_time')),
                    sa.column('earlier', sa.JSON()))  # fmt: skip
    row = sa.table('bundle_part', *(sa.column(name) for name in ('bucket', 'key', 'bundle_id', 'state', 'size')))
    replacing = sa.select(task).where(task.c.state == 'complete', task.c.earlier.is_not(None))
    for found in connection.execute(replacing.order_by(task.c.start_time)).all():
        for key in (found.earlier or {}).get('keys', ()):
            there = sa.and_(row.c.bucket == found.bucket, row.c.key == key)
            before = sa.select(task.c.bundle_id).where(task.c.state.in_(['complete', 'failed']),
                                                       task.c.start_time < found.start_time)  # fmt: skip
            values = {'bundle_id': found.bundle_id, 'state': 'unwanted'}
            taken = sa.update(row).where(there, row.c.bundle_id.in_(before)).values(**values)
            is_known = sa.select(row.c.key).where(there)
            if not connection.execute(taken).rowcount and connection.execute(is_known).first() is None:
                connection.execute(sa.insert(row).values(bucket=found.bucket, key=key, size=0, **values))
