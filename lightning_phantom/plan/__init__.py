"""What would happen to a module; nothing is touched."""
