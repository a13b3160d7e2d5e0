"""Every check of `thrave doctor`, in its order: one table, from which the docs' page is made.

The doctor's round: every check of the table, one after the other, and the clean-up whatever happens.
"""

from collections.abc import Sequence

from thrave.doctor import host_checks, service_checks, store_checks
from thrave.doctor.check_context import CheckContext
from thrave.doctor.checks import Check, Finding, run_check

CHECKS: tuple[Check, ...] = (
    Check(
        "database", "reachable", "Connects, and asks for the version.",
        "Begin a data directory (`thrave account create`), or mend `database_url` and the way to it.",
        service_checks.database,
    ),
    Check(
        "database", "versions", "Compares the versions of Python and SQLite with the oldest supported: 3.11, 3.35.",
        "Run Thrave with a newer Python, or with one that is linked to a newer SQLite.",
        service_checks.versions, needs=("reachable",),
    ),
    Check(
        "database", "tables", "Compares the migrations with this release's.",
        "Start this release once, or install the newer one that the tables were made by.",
        service_checks.tables, needs=("reachable",),
    ),
    Check(
        "database", "write-ahead log", "SQLite writes ahead, so that readers do not wait.",
        "Put `data_dir` on a local file system: SQLite cannot on a network's.",
        service_checks.write_ahead, needs=("reachable",),
    ),
    Check(
        "database", "database's clock", "Compares a PostgreSQL's clock with ours (5 s).",
        "Have both machines' clocks set by NTP.", service_checks.database_clock, needs=("reachable",),
    ),
    Check(
        "service", "vault's key", "Reads vault.key, which nobody else may read.",
        "Copy it from the process that was started first, mode 0600, owned by the service's user.",
        service_checks.vault_key,
    ),
    Check(
        "service", "vault's proof", "Unseals with it what the database holds as a proof.",
        "Copy vault.key and service/ from the process that was started first.",
        service_checks.proof, needs=("tables", "vault's key"),
    ),
    Check(
        "service", "identity", "Reads the service's certificate and keys, and compares them with the database's.",
        "Restore the folder service/ from the backup; all of its files, mode 0600.", service_checks.identity,
        needs=("tables",),
    ),
    Check(
        "store", "answers", "Sends a request without a signature; of a directory: that there is room.",
        "Mend `s3_endpoint`, `s3_ca_file`, `s3_proxy`, or the way to the store; make room.", store_checks.answers,
    ),
    Check(
        "store", "TLS", "The certificate is believed, and lives for 7 days more.",
        "Renew the store's certificate, or name who vouches for it: `s3_ca_file`.", store_checks.tls,
    ),
    Check(
        "store", "key", "Sends a request that is signed with the key; it need not be allowed to list buckets.",
        "With `upload_credentials = policy`: import a key that the store knows (`thrave account key import`), or name "
        "it with --access-key-id. With `upload_credentials = service`: mend `s3_credentials_file`.",
        store_checks.key, needs=("answers",),
    ),
    Check(
        "store", "store's clock", "Compares the Date of an answer with ours (15 min).",
        "Have both machines' clocks set by NTP.", store_checks.clock, needs=("key",),
    ),
    Check(
        "store", "create bucket", "Creates a bucket, unless it is there.",
        "Let the key create buckets; or name one that it may use: --bucket. A key that the store does not know is "
        "refused like one that may not: `thrave account key import`.",
        store_checks.create, needs=("answers", "key"),
    ),
    Check(
        "store", "owner", "Asks whose the bucket is.",
        "Let the key read the object .thrave-owner (`upload_credentials = service`), or use a "
        "bucket of its own (`upload_credentials = policy`).",
        store_checks.owner, needs=("create bucket",),
    ),
    Check(
        "store", "PUT", "Stores an object with a signed request.",
        "Let the key put objects into its bucket; look for a quota, and for room.",
        store_checks.put, needs=("create bucket",),
    ),
    Check(
        "store", "HEAD and ETag", "Asks for its size and its MD5.",
        "Let the key read objects; an ETag that is no MD5 comes from a proxy or an encryption in between.",
        store_checks.head, needs=("PUT",),
    ),
    Check(
        "store", "ranged read", "Reads some bytes out of its middle.",
        "Have the proxy in between hand on the header Range.", store_checks.ranged, needs=("PUT",),
    ),
    Check(
        "store", "list", "Lists it by its prefix.",
        "Let the key list its bucket. Without that right a bucket which a failed task has created stays.",
        store_checks.listed, needs=("PUT",), optional=True,
    ),
    Check(
        "store", "overwrite", "Stores another in its place, and reads that at once.",
        "Take the retention lock off the bucket, and the cache out of the way.", store_checks.overwrite, needs=("PUT",),
    ),
    Check(
        "store", "conditional PUT", "Stores an object only if it does not exist (`If-None-Match: *`), twice.",
        "With `upload_credentials = service` accounts claim new buckets by it. Without it, run one API process only, "
        "or create the buckets beforehand with their owners (docs/howto/store-bundles-in-s3.md).",
        store_checks.conditional, needs=("PUT",), optional=True,
    ),
    Check(
        "store", "POST, version 2", "Uploads a form under a policy with a signature of version 2, `acl` private.",
        "The store takes no such forms, or not of this key: set `upload_credentials = service`.",
        store_checks.version_2, needs=("create bucket",),
    ),
    Check(
        "store", "POST, version 4", "The same with a signature of version 4.",
        "Callers sign their policies by version 2; or set `upload_credentials = service`.",
        store_checks.version_4, needs=("create bucket",), optional=True,
    ),
    Check(
        "store", "AWS CLI's policy", "The same with `acl` ec2-bundle-read, as the AWS CLI has it.",
        "Callers give a policy of their own with another acl (--policy); or set `upload_credentials = service`.",
        store_checks.cli_acl, needs=("create bucket",), optional=True,
    ),
    Check(
        "store", "delete", "Deletes what it has stored, and looks.",
        "Let the key delete objects in its bucket: else the parts of failed tasks stay (`thrave task list`).",
        store_checks.delete, needs=("create bucket",), optional=True,
    ),
    Check(
        "host", "libvirt", "With `hypervisor = libvirt`: connects, asks for the version; it is this machine's.",
        "apt-get install python3-libvirt; start libvirtd; put the service's user into the group libvirt; "
        "mend `libvirt_uri`.",
        host_checks.libvirt, seconds=40.0,
    ),
    Check(
        "host", "instances", "Reads every instance's file, or every adopted domain.",
        "Mend or remove the files named; adopt a domain again, or mend its metadata with `virsh edit`.",
        host_checks.instances, needs=("libvirt",),
    ),
    Check(
        "host", "root volumes", "Each is there, can be read, is what its format says, and refers to no file elsewhere.",
        "Let the service's user read them, and the files of their passphrases: an ACL, where libvirt changes the owner "
        "(docs/howto/bundle-libvirt-guests.md); mend `rootVolume`.",
        host_checks.root_volumes, needs=("libvirt",),
    ),
    Check(
        "host", "commands", "The program of each command is there; none is run.",
        "Install them, or mend the instance's file.", host_checks.commands,
    ),
    Check(
        "host", "power button", "Each domain has ACPI, or a channel for its guest's agent.",
        "Add `<acpi/>` to the domain's `<features>`, or the channel org.qemu.guest_agent.0 and the agent to its guest.",
        host_checks.power_button, needs=("libvirt",),
    ),
    Check(
        "host", "sysprep", "With `sysprep_command`: each guest has an agent that can run it.",
        "Give the domain the channel org.qemu.guest_agent.0, and install the agent in its guest; or unset "
        "`sysprep_command`.",
        host_checks.sysprep, needs=("libvirt",),
    ),
    Check(
        "host", "overlays", "With `capture_mode = overlay`: one can be made beside each root volume (1 GiB of room).",
        "Let the service's user write to the root volume and its folder, and its unit, too (overlays.conf); make room; "
        "apt-get install qemu-utils.",
        host_checks.overlays, needs=("libvirt",),
    ),
    Check(
        "host", "capture mode", "With `capture_mode = overlay`: every root volume can have an overlay.",
        "Instances that cannot are off until their root volume has been read; convert it to a file, or leave it so.",
        host_checks.capture_mode, needs=("libvirt",), optional=True,
    ),
    Check(
        "host", "QEMU", "What reads images is installed, if an instance has one.",
        "apt-get install qemu-utils python3-libnbd", host_checks.qemu, needs=("libvirt",),
    ),
    Check(
        "host", "NTFS", "What reads NTFS is installed, if `skip_unused` needs it.",
        "pip install 'thrave[ntfs]', or set `skip_unused = false`.", host_checks.skipping,
    ),
    Check(
        "host", "sandbox", "The process that reads a guest's file system can be confined (seccomp).",
        "Let the service set a seccomp filter (container runtime, kernel); till then no NTFS volume is checked, and "
        "`skip_unused` is refused.", host_checks.sandbox, optional=True,
    ),
    Check(
        "host", "open files", "The limit of open files is above what the settings may open.",
        "Raise the limit (LimitNOFILE= in the service's unit), or lower `max_connections`.", host_checks.open_files,
    ),
)  # fmt: skip


CLEAN_UP = Check(
    "store", "clean-up", "Takes away what the checks have left, and their bucket.",
    "Remove the bucket, or the objects, whose names begin with thrave-doctor-.", store_checks.clean_up,
    needs=("answers", "key", "create bucket"),
)  # fmt: skip
"""The last one, tried whatever has failed before it."""


def run_all(subject: CheckContext) -> Sequence[Finding]:
    """Try everything."""
    findings: list[Finding] = []
    try:
        for check in CHECKS:
            findings.append(run_check(check, subject, _in_the_way(findings)))
    finally:
        findings.append(run_check(CLEAN_UP, subject, _in_the_way(findings)))
    return findings


def _in_the_way(findings: Sequence[Finding]) -> set[str]:
    return {finding.check.name for finding in findings if finding.in_the_way}
