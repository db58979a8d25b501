"""Adapters: on the host, in files, and in the bank on the device."""
