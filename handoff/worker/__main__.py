"""`python -P -m handoff.worker`: how the master starts a worker."""

from handoff.worker.boot import main

if __name__ == "__main__":
    main()
