"""`python -m mlx_redrafter`."""

from mlx_redrafter.cli.main import main

if __name__ == "__main__":
    main()
