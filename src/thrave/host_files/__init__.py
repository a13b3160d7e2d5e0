"""Files for a Debian host that runs the service: systemd units, users, directories, first settings."""
