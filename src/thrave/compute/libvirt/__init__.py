"""Instances of libvirt: the driver, and what it is made of."""
