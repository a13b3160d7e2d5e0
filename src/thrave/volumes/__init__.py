"""A root volume as extents and bytes, whatever format its file has."""
