"""The table of EC2 clients: package, API version, signature, method, unsupported actions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from clients.kits import Debian, DebianGo, Kit, Npm, PyPI

UNREAD = "fails on an answer without `progress`, as EC2 gives of a pending task; what it asked for is done"
# The copies of `six` in these packages import modules in a way that Python 3.12 has removed.
OLD_SIX = (3, 11)
GOCODE = "/usr/share/gocode/src/github.com/aws"


@dataclass(frozen=True, kw_only=True)
class Client:
    """One client of EC2.

    Attributes:
        name: Its name, with its language if the name does not contain it.
        kit: How the client is installed and started.
        api_version: The API version that it sends.
        signature: How it signs requests.
        method: The HTTP method that it uses.
        signs_policy: Whether it signs the upload policy itself.
        cannot: Actions that it cannot request, or whose response it cannot parse, with the reason.
    """

    name: str
    kit: Kit
    api_version: str = "2016-11-15"
    signature: Literal["version 4", "version 2"] = "version 4"
    method: Literal["POST", "GET"] = "POST"
    signs_policy: bool = False
    cannot: Mapping[str, str] = field(default_factory=dict)


CLIENTS = (
    Client(name="boto3, newest", kit=PyPI("boto3==1.44.5", "boto3_driver.py")),
    # 1.9 and older import names that Python 3.10 removed from `collections`.
    Client(name="boto3, oldest for Python 3.11", kit=PyPI("boto3==1.10.0", "boto3_driver.py", OLD_SIX)),
    Client(
        name="boto 2",
        kit=PyPI("boto==2.49.0", "boto2_driver.py", OLD_SIX),
        api_version="2014-10-01",
        signs_policy=True,
    ),
    Client(name="AWS CLI 1", kit=PyPI("awscli==1.46.3", "aws_cli.sh"), signs_policy=True),
    Client(
        name="AWS CLI 2",
        kit=Debian("awscli", "/usr/bin/aws", (), "aws_cli.sh", {"AWS_CLI": "/usr/bin/aws"}),
        signs_policy=True,
    ),
    Client(name="AWS SDK for JavaScript 3", kit=Npm("@aws-sdk/client-ec2@3.1169.0", "aws_sdk_v3.js")),
    Client(name="AWS SDK for JavaScript 2", kit=Npm("aws-sdk@2.1693.0", "aws_sdk_v2.js")),
    Client(
        name="AWS SDK for Go 1",
        kit=DebianGo("golang-github-aws-aws-sdk-go-dev", f"{GOCODE}/aws-sdk-go/service/ec2/api.go", "go_v1.go"),
    ),
    Client(
        name="AWS SDK for Go 2",
        kit=DebianGo(
            "golang-github-aws-aws-sdk-go-v2-dev", f"{GOCODE}/aws-sdk-go-v2/service/ec2/api_client.go", "go_v2.go"
        ),
    ),
    Client(
        name="AWS SDK for Ruby 1",
        kit=Debian("ruby-aws-sdk", "/usr/lib/ruby/vendor_ruby/aws-sdk-v1.rb", ("ruby",), "aws_sdk_v1.rb"),
        api_version="2014-10-01",
    ),
    Client(
        name="Net::Amazon::EC2 (Perl)",
        kit=Debian("libnet-amazon-ec2-perl", "/usr/share/perl5/Net/Amazon/EC2.pm", ("perl",), "net_amazon_ec2.pl"),
        api_version="2014-06-15",
        cannot={
            "bundle": UNREAD,
            "describe": "takes no filters",
            "cancel": UNREAD,
            "dry-run": "takes no DryRun",
        },
    ),
    Client(
        name="VM::EC2 (Perl)",
        kit=Debian("libvm-ec2-perl", "/usr/share/perl5/VM/EC2.pm", ("perl",), "vm_ec2.pl"),
        api_version="2014-05-01",
        signature="version 2",
    ),
    Client(
        name="libcloud (Python)",
        kit=PyPI("apache-libcloud==3.9.1", "libcloud_driver.py"),
        signature="version 2",
        method="GET",
    ),
)
