"""`python -m lb.host`: the same as `handoff host`."""

from lb.host.cli import main

if __name__ == "__main__":
    main()
