"""The table by which an overlay is merged: complete, and from no place does it lose what the guest has written."""

from itertools import product

import pytest

from thrave.compute.overlay_steps import MERGING, Stand, Step

V, O, E, N = Stand.VOLUME, Stand.OVERLAY, Stand.ELSEWHERE, Stand.NOWHERE


def test_the_table_is_complete():
    assert set(MERGING) == set(product(Stand, Stand))


def taken(step, live, config):
    """Where the definitions stand after a step was taken to its end, and whether the overlay is in the volume then."""
    match step:
        case Step.COMMIT_LIVE:  # libvirt has the domain start from there too, if it was to start from the same overlay
            return V, (V if config is O else config), True
        case Step.COMMIT_OFF:
            return live, V, True
        case Step.REDEFINE:
            return live, V, False
    raise AssertionError(f"{step} leads nowhere")


@pytest.mark.parametrize(("live", "config"), list(product(Stand, Stand)))
def test_from_everywhere_it_ends_and_only_what_is_merged_is_removed(live, config):
    written_in_overlay = O in {live, config} and live is not V
    merged = False
    for _ in range(4):
        step = MERGING[live, config]
        if step in {Step.CLEAN_UP, Step.COMMIT_FILES, Step.REFUSE}:
            break
        live, config, in_volume = taken(step, live, config)
        merged = merged or in_volume
    else:
        raise AssertionError("it goes on for ever")
    assert (step is Step.REFUSE) is (E in {live, config})
    if step is Step.CLEAN_UP:
        assert O not in {live, config}, "something would be started on what is removed"
        assert merged or not written_in_overlay


def test_after_a_domain_that_runs_on_the_volume_goes_off_nothing_starts_on_the_overlay():
    assert MERGING[V, O] is Step.REDEFINE
    assert MERGING[N, V] is Step.CLEAN_UP
