"""`python -m qgraph`: the same as the command `qgraph`."""

from qgraph.cli import main

if __name__ == "__main__":
    main()
