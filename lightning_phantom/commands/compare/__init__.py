"""`lightning-phantom compare`: the same training by several methods, side by side.

options  what is asked for
command  the ranks, and which method trains when
methods  what trains without a strategy of this package
trial    one fit, measured
report   medians, ratios and warnings
show     a table, a JSON file, a picture
"""
