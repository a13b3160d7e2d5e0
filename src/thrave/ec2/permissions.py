"""Who may do what at the door: an account's own key everything, a user's what the user's policies permit.

This joins what a request tells about itself to the decision of `thrave.identity.policies`. It costs the account's own
key nothing, and holds no rule of its own.
"""

from dataclasses import dataclass

from thrave.database import utc_now
from thrave.ec2.door import Caller
from thrave.identity.policies import is_allowed
from thrave.identity.policy_conditions import RequestContext, source_address
from thrave.identity.users import Users


@dataclass(frozen=True, kw_only=True)
class Permissions:
    """The permissions of accounts and users.

    Attributes:
        users: Whose policies decide.
        region: The service's, for the condition key `ec2:Region`; a signature's scope is the client's own choice.
    """

    users: Users
    region: str

    def may(self, caller: Caller, action: str, resource: str) -> bool:
        """Say whether a caller may do an action, such as `ec2:BundleInstance`, on a resource; see `Door.may`."""
        if caller.user is None:
            return True
        context = RequestContext(
            region=self.region,
            source_ip=source_address(caller.source_ip),
            secure_transport=caller.secure_transport,
            current_time=utc_now(),
        )
        return is_allowed(self.users.statements(caller.user), action, resource, context)
