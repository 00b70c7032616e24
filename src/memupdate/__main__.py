"""`python -m memupdate` is the console script `memupdate`."""

from memupdate.cli import main

if __name__ == "__main__":
    main()
