"""``python -m lrp_fast``: the command line."""

from lrp_fast.cli import main

if __name__ == "__main__":
    main()
