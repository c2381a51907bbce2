"""`python -m brigade` is the `brigade` command. Must not hold anything of its own."""

from brigade.cli import main

if __name__ == "__main__":
    main()
