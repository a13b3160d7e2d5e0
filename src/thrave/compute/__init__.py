"""Instances and hypervisor drivers: list instances, stop and start them, run them on overlays."""
