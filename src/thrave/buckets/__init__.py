"""Object stores for bundles: the contract, its drivers, and the upload policy."""
