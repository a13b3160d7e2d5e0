"""The table of merge steps is complete, and no sequence of steps loses data of the guest."""

from itertools import product

import pytest

from thrave.compute.libvirt.overlay_merge import MERGING, DiskLocation, MergeStep

VOLUME, OVERLAY, ELSEWHERE, NOWHERE = (
    DiskLocation.VOLUME,
    DiskLocation.OVERLAY,
    DiskLocation.ELSEWHERE,
    DiskLocation.NOWHERE,
)


def test_merge_table_is_complete():
    assert set(MERGING) == set(product(DiskLocation, DiskLocation))


def perform(step, live, config):
    """Return the disk locations after a step, and whether the overlay is merged then."""
    match step:
        case (
            MergeStep.COMMIT_LIVE
        ):  # libvirt also changes the definition for the next start if that uses the same overlay
            return VOLUME, (VOLUME if config is OVERLAY else config), True
        case MergeStep.COMMIT_OFF:
            return live, VOLUME, True
        case MergeStep.REDEFINE:
            return live, VOLUME, False
    raise AssertionError(f"{step} is an end")


@pytest.mark.parametrize(("live", "config"), list(product(DiskLocation, DiskLocation)))
def test_merge_ends_from_each_state_and_removes_only_merged_overlay(live, config):
    written_in_overlay = OVERLAY in {live, config} and live is not VOLUME
    merged = False
    for _ in range(4):
        step = MERGING[live, config]
        if step in {MergeStep.CLEAN_UP, MergeStep.COMMIT_FILES, MergeStep.REFUSE}:
            break
        live, config, in_volume = perform(step, live, config)
        merged = merged or in_volume
    else:
        raise AssertionError("the merge does not end")
    assert (step is MergeStep.REFUSE) is (ELSEWHERE in {live, config})
    if step is MergeStep.CLEAN_UP:
        assert OVERLAY not in {live, config}, "no definition may use a removed overlay"
        assert merged or not written_in_overlay


def test_domain_on_volume_is_never_started_on_overlay():
    assert MERGING[VOLUME, OVERLAY] is MergeStep.REDEFINE
    assert MERGING[NOWHERE, VOLUME] is MergeStep.CLEAN_UP
