"""GetCallerIdentity of AWS STS: whose access key signs. What many tools ask first of all."""

from thrave.ec2.door import Caller, Door
from thrave.ec2.protocol import Parameters, Result


def get_caller_identity(_door: Door, caller: Caller, _parameters: Parameters) -> Result:
    """Tell callers who they are, in IAM's words: the account's own key is its root user's."""
    if caller.user is not None:
        return {"UserId": caller.user.user_id, "Account": caller.account_id, "Arn": caller.user.arn}
    return {"UserId": caller.account_id, "Account": caller.account_id, "Arn": f"arn:aws:iam::{caller.account_id}:root"}
