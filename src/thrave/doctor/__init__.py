"""Checks everything that a bundle task needs, before any instance is shut down."""
