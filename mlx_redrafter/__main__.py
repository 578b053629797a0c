"""`python -m mlx_redrafter`."""

from mlx_redrafter.cli import main

if __name__ == "__main__":
    main()
