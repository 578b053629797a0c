"""The machine under us: devices, matrix libraries, compilers, clocks, paths."""
