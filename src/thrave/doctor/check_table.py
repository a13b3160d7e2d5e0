"""Every check of `thrave doctor` in its order, and the run over all of them.

`make docs` generates docs/reference/doctor.md from the table.
"""

from collections.abc import Sequence

from thrave.doctor import host_checks, service_checks, store_checks
from thrave.doctor.check_context import CheckContext
from thrave.doctor.checks import Check, Finding, run_check

CHECKS: tuple[Check, ...] = (
    Check(
        "database", "reachable", "Connects to the database and reads its version.",
        "Create a data directory (`thrave account create`), or fix `database_url` or the network to the database.",
        service_checks.check_database,
    ),
    Check(
        "database", "versions", "Compares the versions of Python and SQLite with the oldest supported: 3.11, 3.35.",
        "Run Thrave with a newer Python, or with one that is linked to a newer SQLite.",
        service_checks.check_versions, needs=("reachable",),
    ),
    Check(
        "database", "tables", "Compares the applied migrations with those of this release.",
        "Start this release once, or install the newer release that created the tables.",
        service_checks.check_tables, needs=("reachable",),
    ),
    Check(
        "database", "write-ahead log", "SQLite uses a write-ahead log, so that readers do not wait.",
        "Put `data_dir` on a local file system: SQLite has no write-ahead log on a network file system.",
        service_checks.check_write_ahead_log, needs=("reachable",),
    ),
    Check(
        "database", "database clock", "Compares the clock of PostgreSQL with the clock of this machine (5 s).",
        "Set the clocks of both machines by NTP.", service_checks.check_database_clock, needs=("reachable",),
    ),
    Check(
        "service", "vault key", "Reads vault.key, which only the service's user may read.",
        "Copy vault.key from the process that was started first, mode 0600, owned by the service's user.",
        service_checks.check_vault_key,
    ),
    Check(
        "service", "vault check", "Decrypts the database's check value with the vault key.",
        "Copy vault.key and service/ from the process that was started first.",
        service_checks.check_vault, needs=("tables", "vault key"),
    ),
    Check(
        "service", "identity", "Reads the service's certificate and keys, and compares them with the database.",
        "Restore the folder service/ with all its files from the backup, mode 0600.",
        service_checks.check_identity, needs=("tables",),
    ),
    Check(
        "store", "available", "Sends an unsigned request. For bucket directories: checks the free space.",
        "Fix `s3_endpoint`, `s3_ca_file`, `s3_proxy` or the network to the store. For bucket directories: free space.",
        store_checks.check_available,
    ),
    Check(
        "store", "TLS", "The certificate is trusted and valid for at least 7 more days.",
        "Renew the store's certificate, or set `s3_ca_file` to the CA that issued it.", store_checks.check_tls,
    ),
    Check(
        "store", "key", "Sends a request that is signed with the key. The key need not be allowed to list buckets.",
        "With `upload_credentials = policy`: import a key that the store knows (`thrave account key import`), or name "
        "it with --access-key-id. With `upload_credentials = service`: fix `s3_credentials_file`.",
        store_checks.check_key, needs=("available",),
    ),
    Check(
        "store", "store clock", "Compares the Date header of a response with the clock of this machine (15 min).",
        "Set the clocks of both machines by NTP.", store_checks.check_clock, needs=("key",),
    ),
    Check(
        "store", "create bucket", "Creates a bucket, unless it exists.",
        "Allow the key to create buckets, or name a bucket that it may use with --bucket. Some stores answer an "
        "unknown key as they answer a key without permission: `thrave account key import`.",
        store_checks.check_create_bucket, needs=("available", "key"),
    ),
    Check(
        "store", "owner", "Reads the bucket's owner.",
        "Allow the key to read the object .thrave-owner (`upload_credentials = service`), or use a "
        "bucket of its own (`upload_credentials = policy`).",
        store_checks.check_owner, needs=("create bucket",),
    ),
    Check(
        "store", "PUT", "Stores an object with a signed request.",
        "Allow the key to put objects into its bucket. Check the quota and the free space of the store.",
        store_checks.check_put, needs=("create bucket",),
    ),
    Check(
        "store", "HEAD and ETag", "Reads the object's size and its MD5.",
        "Allow the key to read objects. An ETag that is not the MD5 comes from a proxy, or from encryption by "
        "the store.",
        store_checks.check_head, needs=("PUT",),
    ),
    Check(
        "store", "ranged read", "Reads some bytes from the middle of the object.",
        "Configure the proxy to forward the Range header.", store_checks.check_ranged_read, needs=("PUT",),
    ),
    Check(
        "store", "list", "Lists the object by its prefix.",
        "Allow the key to list its bucket. Without this permission, a bucket that a failed task created remains.",
        store_checks.check_list, needs=("PUT",), optional=True,
    ),
    Check(
        "store", "overwrite", "Overwrites the object and reads it at once.",
        "Remove the retention lock of the bucket, and any cache between the service and the store.",
        store_checks.check_overwrite, needs=("PUT",),
    ),
    Check(
        "store", "conditional PUT", "Stores an object only if it does not exist (`If-None-Match: *`), twice.",
        "With `upload_credentials = service` accounts claim new buckets by it. Without it, run one API process only, "
        "or create the buckets beforehand with their owners (docs/howto/store-bundles-in-s3.md).",
        store_checks.check_conditional_put, needs=("PUT",), optional=True,
    ),
    Check(
        "store", "POST, version 2", "Uploads a form with a policy, a signature of version 2 and `acl` private.",
        "The store does not accept such forms, or not from this key: set `upload_credentials = service`.",
        store_checks.check_post_v2, needs=("create bucket",),
    ),
    Check(
        "store", "POST, version 4", "The same with a signature of version 4.",
        "Callers must sign their policies with version 2; or set `upload_credentials = service`.",
        store_checks.check_post_v4, needs=("create bucket",), optional=True,
    ),
    Check(
        "store", "AWS CLI policy", "The same with `acl` ec2-bundle-read, which the AWS CLI uses.",
        "Callers must pass a policy of their own with another acl (--policy); or set `upload_credentials = service`.",
        store_checks.check_aws_cli_policy, needs=("create bucket",), optional=True,
    ),
    Check(
        "store", "delete", "Deletes the objects it stored, and checks that they no longer exist.",
        "Allow the key to delete objects in its bucket. Otherwise the parts of failed tasks remain "
        "(`thrave task list`).",
        store_checks.check_delete, needs=("create bucket",), optional=True,
    ),
    Check(
        "host", "libvirt", "With `hypervisor = libvirt`: connects, reads the version, and checks that it is local.",
        "apt-get install python3-libvirt; start libvirtd; add the service's user to the group libvirt; "
        "fix `libvirt_uri`.",
        host_checks.check_libvirt, seconds=40.0,
    ),
    Check(
        "host", "instances", "Reads every instance's file, or every adopted domain.",
        "Fix or remove the files named. Adopt a domain again, or fix its metadata with `virsh edit`.",
        host_checks.check_instances, needs=("libvirt",),
    ),
    Check(
        "host", "root volumes", "Each exists, is readable, has the stated format, and refers to no file elsewhere.",
        "Allow the service's user to read them and their passphrase files, with an ACL where libvirt changes the owner "
        "(docs/howto/bundle-libvirt-guests.md). Fix `rootVolume`.",
        host_checks.check_root_volumes, needs=("libvirt",),
    ),
    Check(
        "host", "commands", "The program of each command exists; none is run.",
        "Install the programs, or fix the instance's file.", host_checks.check_commands,
    ),
    Check(
        "host", "power button", "Each domain has ACPI, or a channel for the guest agent.",
        "Add `<acpi/>` to the domain's `<features>`; or add the channel org.qemu.guest_agent.0, and install the agent "
        "in its guest.",
        host_checks.check_power_button, needs=("libvirt",),
    ),
    Check(
        "host", "sysprep", "With `sysprep_command`: each guest has an agent that can run it.",
        "Add the channel org.qemu.guest_agent.0 to the domain, and install the agent in its guest; or unset "
        "`sysprep_command`.",
        host_checks.check_sysprep, needs=("libvirt",),
    ),
    Check(
        "host", "overlays", "With `capture_mode = overlay`: an overlay can be created next to each root volume "
        "(1 GiB free).",
        "Allow the service's user, and its unit (overlays.conf), to write to the root volume and its folder. Free "
        "space. apt-get install qemu-utils.",
        host_checks.check_overlays, needs=("libvirt",),
    ),
    Check(
        "host", "capture mode", "With `capture_mode = overlay`: every root volume can have an overlay.",
        "The other instances stay off until their root volume has been read. Convert the root volume to a file, or "
        "accept this.",
        host_checks.check_capture_mode, needs=("libvirt",), optional=True,
    ),
    Check(
        "host", "QEMU", "The programs that read QEMU's image formats are installed, if an instance has such an image.",
        "apt-get install qemu-utils python3-libnbd", host_checks.check_qemu, needs=("libvirt",),
    ),
    Check(
        "host", "NTFS", "The library that reads NTFS is installed, if `skip_unused` needs it.",
        "pip install 'thrave[ntfs]', or set `skip_unused = false`.", host_checks.check_ntfs,
    ),
    Check(
        "host", "sandbox", "The process that reads a guest's file system can be sandboxed (seccomp).",
        "Allow the service to set a seccomp filter (container runtime, kernel). Until then no NTFS volume is checked, "
        "and `skip_unused` is refused.", host_checks.check_sandbox, optional=True,
    ),
    Check(
        "host", "open files", "The limit of open files is at least what the settings may need.",
        "Raise the limit (LimitNOFILE= in the service's unit), or lower `max_connections`.",
        host_checks.check_open_files,
    ),
)  # fmt: skip


CLEAN_UP = Check(
    "store", "clean-up", "Deletes the objects of the checks, and their bucket.",
    "Remove the buckets and objects whose names begin with thrave-doctor-.", store_checks.clean_up,
    needs=("available", "key", "create bucket"),
)  # fmt: skip
"""The last check. It runs whatever failed before."""


def run_all(context: CheckContext) -> Sequence[Finding]:
    """Run every check, then the cleanup."""
    findings: list[Finding] = []
    try:
        for check in CHECKS:
            findings.append(run_check(check, context, _blocking_checks(findings)))
    finally:
        findings.append(run_check(CLEAN_UP, context, _blocking_checks(findings)))
    return findings


def _blocking_checks(findings: Sequence[Finding]) -> set[str]:
    return {finding.check.name for finding in findings if finding.is_blocking}
