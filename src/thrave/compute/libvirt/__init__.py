"""The libvirt driver and its parts."""
