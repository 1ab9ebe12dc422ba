"""The built-in quantizers, one file each; found by listing this package."""
