"""Formats that a configuration can be written in, one file each."""
