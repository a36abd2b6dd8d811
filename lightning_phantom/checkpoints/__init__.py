"""Saving and loading: the user's checkpoint stays the user's.

format      every key of it, and what it must agree on with a module
states      where the state dicts of split layers are in it
full        one file with dense weights
sharded     a directory to which every rank writes
optimizers  states by parameter name
rng         random number generators
store       saves and loads either, without a Trainer
files       files that are whole whatever happens
versions    the same of directories
"""
