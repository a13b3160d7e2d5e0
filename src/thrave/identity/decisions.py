"""The decision: may this request be made, by the policies of who makes it?

Default deny, and an explicit Deny wins: the two rules of AWS, IAM User Guide, "Policy evaluation logic", for policies
of users. It is pure; statements come from `policies.py`, which has refused every policy that it did not fully
understand, so there is no third answer and no error here.

Why no engine of somebody else's: Cedar (by cedarpy 4.12) was tried. Its part would be the two lines below, while all of
IAM's meaning would still have to be ours, written out as Cedar's text. Where the two differ it errs to the wrong side:
a `forbid` that reads a value that the request lacks is skipped, and the request permitted. It has no `?` and no
comparison without case, takes no `::ffff:` address and no `+01:00` in a date, and needs 16 MiB and 170 us for a
decision. It serves as the tests' oracle instead: on what both can say, both must say the same.
"""

from collections.abc import Iterable

from thrave.identity.conditions import Context
from thrave.identity.policies import Statement

NO_RESOURCE = "*"  # what an action acts on that acts on no single resource


def permits(statements: Iterable[Statement], action: str, resource: str, context: Context) -> bool:
    """Decide.

    Args:
        statements: Of every policy of the user together.
        action: Such as `ec2:BundleInstance`.
        resource: An ARN, or `NO_RESOURCE`.
        context: What else is known of the request.
    """
    effects = {each.effect for each in statements if each.applies(action, resource, context)}
    return "Allow" in effects and "Deny" not in effects
