"""Imported last by the process that ranks are forked from: what it holds is nothing for their garbage collectors."""

import gc

gc.collect()
gc.freeze()
