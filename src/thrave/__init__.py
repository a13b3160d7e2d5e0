"""Thrave: EC2's BundleInstance for anyone's own hypervisors and any S3-compatible store."""
