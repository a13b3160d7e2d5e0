"""Thrave: EC2's BundleInstance API for KVM hosts and S3-compatible stores."""
