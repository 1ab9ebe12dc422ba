"""The built-in knobs, one file each; found by listing this package."""
