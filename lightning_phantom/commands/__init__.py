"""The command line: `cli` (fit, validate, test, predict), `plan`, `convert`, `compare`."""
