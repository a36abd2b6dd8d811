"""Learns a machine's numbers by running on it."""
