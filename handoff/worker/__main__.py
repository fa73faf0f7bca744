"""`python -P -m handoff.worker`: how the master starts a worker."""

from handoff.worker.collector import begin_boot

if __name__ == "__main__":
    begin_boot()
    from handoff.worker.boot import main

    main()
