"""The version: of the package, and written into every exported model."""

__version__ = "0.1.0"
