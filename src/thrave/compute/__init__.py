"""Instances: which there are, whose they are, how to stop and start them."""
