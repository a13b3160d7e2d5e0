"""The `thrave` command."""
