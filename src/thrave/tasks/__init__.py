"""Bundle tasks: rows, workflow, uploads, instance power, cleanup, hosts and leases."""
