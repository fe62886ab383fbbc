"""`python -m loraq` is the command `loraq`."""

from loraq.cli import main

if __name__ == "__main__":
    main()
