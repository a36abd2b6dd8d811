"""`lightning-phantom compare`: the same training by several methods, side by side."""
