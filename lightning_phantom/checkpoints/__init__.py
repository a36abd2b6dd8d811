"""Saving and loading: the user's checkpoint stays the user's. `format` says what stands in one."""
