"""Bundle tasks as a client of the service sees them."""

from support.eventually import eventually

ENDED = ("complete", "failed")
"""States after which a task does not change any more."""


def describe_task(ec2, bundle_id):
    """Return one task as DescribeBundleTasks shows it."""
    (task,) = ec2.describe_bundle_tasks(BundleIds=[bundle_id])["BundleTasks"]
    return task


def await_task(ec2, bundle_id, *states, seen=None):
    """Wait until a task is in one of the states, by default `complete` or `failed`, and return it.

    Args:
        seen: A list that gets each new state, for a test that checks their order.
    """
    states = states or ENDED

    def describe():
        task = describe_task(ec2, bundle_id)
        if seen is not None and seen[-1:] != [task["State"]]:
            seen.append(task["State"])
        assert task["State"] in states or task["State"] not in ENDED, f"ended before it was {states}: {task}"
        return task

    return eventually(describe, f"{bundle_id} is {' or '.join(states)}", until=lambda task: task["State"] in states)
