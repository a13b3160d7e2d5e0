"""A simulated object store with every fault that the product must survive.

A request takes time on its way to the store and back. It may be refused, fail before or after it took effect, or hang;
a request without a response may take effect up to an hour later (`SETTLE` in `thrave.tasks.claims` is the limit that
the product relies on), also after its sender was killed.
"""

import hashlib
from contextlib import suppress

from simulation.scheduler import ProcessKilled
from thrave.buckets.base import ObjectHead
from thrave.buckets.errors import AccessDenied, NoSuchBucket, NoSuchKey, StoreError, TransientError
from thrave.concurrency import utc_now
from thrave.write_guard import store_guard

MAX_DELAY = 3000.0  # seconds; below SETTLE
_TRAVEL_TIMES = [0.0], [0.0, 0.0, 0.001, 0.1, 2.0]  # a fast store is ahead of the thread that waits for it


class SimulatedStore:
    """`thrave.buckets.base.ObjectStore`.

    Attributes:
        objects: Content by key, of the one bucket that the runs use.
        has_bucket: Whether it exists.
        keeps_etags: Whether the store returns MD5s.
    """

    def __init__(self, world, bucket, owner):
        self._world = world
        self.bucket = bucket
        self._owner = owner
        self.objects = {}
        self.keeps_etags = world.random.random() < 0.7
        self._travel_times = world.random.choice(_TRAVEL_TIMES)
        self.has_bucket = world.random.random() < 0.7
        self.is_full = False
        self.in_flight = 0  # requests that take effect later
        self.version = 0  # of the objects and of what is in flight

    def on_behalf_of(self, access_key_id):
        return self

    def owner(self, bucket):
        return self._call("owner", "", lambda: self._owner if bucket == self.bucket and self.has_bucket else None)

    def create(self, bucket, owner, *, probe=None):
        def apply():
            is_created, self.has_bucket = not self.has_bucket, True
            if is_created:
                self._world.invariants.bucket_creator = None
            return is_created

        return self._call("create", "", apply)

    def remove(self, bucket, owner):
        def apply():
            if self.objects:
                return False
            self._world.invariants.before_bucket_removal()
            self.version += 1
            self.has_bucket = False
            return True

        return self._call("remove", "", apply, is_write=True)

    def put(self, bucket, key, data, *, policy=None):
        content = bytes(data)
        if policy is not None:
            policy.check_upload(bucket, key, content_length=len(content), now=utc_now())

        def apply():
            self._check_bucket(bucket)
            self._world.invariants.before_change(key, content)
            self.version += 1
            self.objects[key] = content
            self._world.note(f"the store has {key} ({len(content)} bytes)")
            return self._etag(content)

        return self._call("put", key, apply, is_write=True, content=content)

    def head(self, bucket, key):
        def apply():
            content = self.objects.get(key)
            return None if content is None else ObjectHead(len(content), self._etag(content))

        return self._call("head", key, apply)

    def get(self, bucket, key):
        def apply():
            self._check_bucket(bucket)
            if key not in self.objects:
                raise NoSuchKey(f"no object {key}")
            return self.objects[key]

        return self._call("get", key, apply)

    def get_range(self, bucket, key, start, length):
        return self.get(bucket, key)[start : start + length]

    def list(self, bucket, prefix):
        def apply():
            return sorted(key for key in self.objects if key.startswith(prefix))

        yield from self._call("list", prefix, apply)

    def delete(self, bucket, keys):
        wanted = [*keys]

        def apply():
            for key in wanted:
                if key in self.objects:
                    self._world.invariants.before_change(key, None)
                    self.version += 1
                    del self.objects[key]
                    self._world.note(f"the store deleted {key}")

        self._call("delete", ",".join(wanted), apply, is_write=True)

    def _etag(self, content):
        return hashlib.md5(content).hexdigest() if self.keeps_etags else None

    def _check_bucket(self, bucket):
        if bucket != self.bucket or not self.has_bucket:
            raise NoSuchBucket(bucket)

    def _call(self, operation, key, apply, *, is_write=False, content=b""):
        """Send one request: the way there, its effect, the way back, with the faults of this run."""
        world = self._world
        faults, scheduler = world.faults, world.scheduler
        if scheduler.current is None:
            return apply()
        scheduler.check_alive()
        store_guard.check()
        if is_write:
            world.invariants.before_write(f"{operation} {key}")
        self._fail_before(operation, key, apply, is_write=is_write)
        try:
            scheduler.sleep(self._travel_time())
        except ProcessKilled:
            if is_write and world.random.random() < 0.5:
                self._deliver_later(world.random.choice([0.1, 10.0, 1000.0]), operation, key, apply)
            raise
        if operation == "put" and faults.occurs("store: put acknowledged but lost"):
            world.note(f"the store loses {key}, although it confirms it")
            return self._etag(content)
        result = apply()
        if is_write and faults.occurs(f"store: {operation} answer lost"):
            world.note(f"the response to {operation} {key} is lost")
            scheduler.sleep(world.random.choice([0.1, 10.0]))
            raise TransientError("ConnectionLost", 0, "the response was lost")
        scheduler.sleep(self._travel_time())
        return result

    def _fail_before(self, operation, key, apply, *, is_write):
        """The faults of a request that has no effect, or not yet."""
        faults, scheduler, kind = self._world.faults, self._world.scheduler, f"store: {operation}"
        if faults.occurs(f"{kind} refused"):
            self._world.note(f"the store refuses {operation} {key}")
            scheduler.sleep(self._travel_time())
            raise AccessDenied("not allowed by this run")
        if operation == "put" and self.is_full:
            raise StoreError("QuotaExceeded", 507, "the store is full")
        if faults.occurs(f"{kind} fails"):
            self._world.note(f"{operation} {key} does not reach the store")
            scheduler.sleep(self._travel_time())
            raise TransientError("ServiceUnavailable", 503, "try again")
        if faults.occurs(f"{kind} delayed"):
            if is_write:
                self._deliver_later(MAX_DELAY ** self._world.random.random(), operation, key, apply)
            scheduler.sleep(self._world.random.choice([1.0, 10.0, 40.0, 100.0, 400.0]))
            raise TransientError("NoResponse", 0, "no response")

    def _deliver_later(self, seconds, operation, key, apply):
        """Have a request without a response take effect later."""
        world = self._world
        world.note(f"{operation} {key} reaches the store in {seconds:.0f} s")

        self.in_flight += 1

        def deliver():
            self.in_flight -= 1
            self.version += 1
            world.note(f"{operation} {key} reaches the store late")
            with suppress(NoSuchBucket):
                apply()

        world.scheduler.call_later(seconds, deliver)

    def _travel_time(self):
        return self._world.random.choice(self._travel_times)
