"""The one place of the version: packaging and saved files read it here."""

__version__ = "0.1.0"
