"""One function for each EC2 action, grouped by what they act on."""
