"""`python -m lightning_sparse.cli`: the same as `lightning-sparse`."""

from lightning_sparse.cli.entry import main

if __name__ == "__main__":
    main()
