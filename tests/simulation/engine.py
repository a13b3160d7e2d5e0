"""The task queue and the worker of a simulated host: an engine that runs each task at least once.

It is an adversary: a workflow may be started late, twice at once, again after its end, or on another host.
"""

from thrave.concurrency import monotonic, random_hex, sleep

POLLING_INTERVAL = 1.0


class SimulatedQueue:
    """`thrave.tasks.engine.TaskQueue` on a table of the simulated database."""

    def __init__(self, world):
        self._world = world

    def enqueue(self, connection, bundle_id, host):
        self._add(connection, bundle_id, bundle_id, host)

    def requeue(self, connection, bundle_id, host):
        self._add(connection, f"{bundle_id}.{random_hex(4)}", bundle_id, host)

    def scheduled(self, host):
        return self._with_state(host, "ENQUEUED")

    def started(self, host):
        return self._with_state(host, "PENDING")

    def cancel(self, host, bundle_ids):
        self._world.scheduler.switch_point()
        for bundle_id in bundle_ids:
            self._world.database.rows(
                "UPDATE workflow SET state = 'CANCELLED' WHERE host = ? AND bundle_id = ? AND state IN "
                "('PENDING', 'ENQUEUED')",
                host,
                bundle_id,
            )

    def cancel_other_versions(self, host):
        pass

    def delete_ended(self, before):
        return 0

    def close(self):
        pass

    def _add(self, connection, workflow_id, bundle_id, host):
        connection.exec_driver_sql("INSERT INTO workflow VALUES (?, ?, ?, 'ENQUEUED')", (workflow_id, bundle_id, host))

    def _with_state(self, host, state):
        self._world.scheduler.switch_point()
        found = self._world.database.rows("SELECT bundle_id FROM workflow WHERE host = ? AND state = ?", host, state)
        return frozenset(bundle_id for (bundle_id,) in found)


class SimulatedWorker:
    """`thrave.tasks.engine.TaskWorker`: runs the workflows of one host."""

    def __init__(self, world, host, worker_concurrency):
        self._world = world
        self._host = host
        self._slots = worker_concurrency
        self._running = 0
        self._takes = True

    def launch(self, bundle):
        self._bundle = bundle
        rows, scheduler = self._world.database.rows, self._world.scheduler
        for (workflow_id,) in rows("SELECT id FROM workflow WHERE host = ? AND state = 'PENDING'", self._host):
            self._start(workflow_id)
        scheduler.start(scheduler.current.process, "worker", self._poll)

    def drain(self, seconds):
        self._takes = False
        end = monotonic() + seconds
        while self._running and monotonic() < end:
            sleep(POLLING_INTERVAL)

    def _poll(self):
        world = self._world
        while True:
            sleep(POLLING_INTERVAL * (0.5 + world.random.random()))
            if not self._takes:
                continue
            found = world.database.rows("SELECT id FROM workflow WHERE host = ? AND state = 'ENQUEUED'", self._host)
            for (workflow_id,) in found:
                if self._running < self._slots and not world.faults.occurs("engine: late"):
                    self._start(workflow_id)
            if world.faults.occurs("engine: again"):
                self._run_again()

    def _run_again(self):
        """Run a workflow that runs already, has ended, or belongs to another host."""
        world = self._world
        found = world.database.rows("SELECT id, host, state FROM workflow")
        if found:
            workflow_id, host, state = found[world.random.randrange(len(found))]
            world.note(f"the engine runs {workflow_id} of {host} ({state}) on {self._host}")
            self._start(workflow_id, is_extra=True)

    def _start(self, workflow_id, *, is_extra=False):
        world = self._world
        if not is_extra:
            world.database.rows("UPDATE workflow SET state = 'PENDING' WHERE id = ?", workflow_id)
            self._running += 1
            if world.faults.occurs("engine: twice"):
                self._start(workflow_id, is_extra=True)
        process = world.scheduler.current.process
        world.scheduler.start(process, f"workflow {workflow_id}", lambda: self._run(workflow_id, is_extra))

    def _run(self, workflow_id, is_extra):
        state = "SUCCESS"
        try:
            self._bundle(workflow_id.partition(".")[0])
        except Exception as error:  # noqa: BLE001 (the engine records it, and does not run the workflow again)
            state = "ERROR"
            self._world.note(f"the workflow {workflow_id} raised {error!r}")
            self._world.count(f"workflow raised {type(error).__name__}")
        if not is_extra:
            self._running -= 1
            self._world.database.rows(
                "UPDATE workflow SET state = ? WHERE id = ? AND state = 'PENDING'", state, workflow_id
            )
