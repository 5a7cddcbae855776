"""The version of the package; exported models record it."""

__version__ = "0.1.0"
