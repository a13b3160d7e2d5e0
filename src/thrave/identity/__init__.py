"""Accounts, their access keys and certificates."""
