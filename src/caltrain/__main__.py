"""`python -m caltrain` is the `caltrain` command."""

from caltrain.cli import main

if __name__ == "__main__":
    main()
