"""`python -m handoff`."""

from handoff.cli import main

if __name__ == "__main__":
    main()
