"""The doctor's round: every check of the table, one after the other, and the clean-up whatever happens."""

from collections.abc import Sequence

from thrave.doctor.check import Finding, perform
from thrave.doctor.subject import Subject
from thrave.doctor.table import CHECKS, CLEAN_UP


def examine(subject: Subject) -> Sequence[Finding]:
    """Try everything."""
    findings: list[Finding] = []
    try:
        for check in CHECKS:
            findings.append(perform(check, subject, _in_the_way(findings)))
    finally:
        findings.append(perform(CLEAN_UP, subject, _in_the_way(findings)))
    return findings


def _in_the_way(findings: Sequence[Finding]) -> set[str]:
    return {finding.check.name for finding in findings if finding.in_the_way}
