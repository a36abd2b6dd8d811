"""`python -m lightning_phantom`."""

from lightning_phantom.commands.cli import main

if __name__ == "__main__":
    main()
