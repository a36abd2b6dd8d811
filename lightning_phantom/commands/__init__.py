"""The command line.

cli          `lightning-phantom` itself: fit, validate, test, predict
plan         what would happen and what it would cost; plan_tables shows it
convert      checkpoints
compare      methods, side by side
recipe       reads a run's config
terminal     what all of them print with
"""
