"""`python -m mlx_redrafter.convert` is `mlx-redrafter convert`."""

import sys

from mlx_redrafter.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
