"""Where bundles go: buckets, their owners, and the upload policy."""
