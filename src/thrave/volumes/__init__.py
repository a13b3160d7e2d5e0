"""A root volume as extents and bytes, whatever the format of its file."""
