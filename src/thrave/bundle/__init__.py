"""The AMI bundle format: seal, open, verify, show. Pure: no network, no database, no clock of its own."""
