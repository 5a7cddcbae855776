"""Numbers with units as text."""

MIB, GIB = 2**20, 2**30
FLOP_UNITS = (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
TIME_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def in_unit(size: float, unit: int = GIB) -> str:
    """Return a number of bytes in a unit as text: with one decimal, or with two significant digits if it is below 1."""
    value = size / unit
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}" if value >= 1e-4 else "0"


def flops(count: float) -> str:
    """Return a number of floating-point operations in the largest unit that leaves at least 1."""
    unit, size = next(((unit, size) for unit, size in FLOP_UNITS if count >= size), FLOP_UNITS[-1])
    return f"{count / size:.3g} {unit}"


def duration(seconds: float) -> str:
    """Return a duration in the largest unit that leaves at least 1."""
    unit, size = next(((unit, size) for unit, size in TIME_UNITS if seconds >= size), TIME_UNITS[-1])
    return f"{seconds / size:.3g} {unit}"
