"""The built-in pruning criteria, one file each; found by listing this package."""
