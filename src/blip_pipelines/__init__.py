"""Train the BLIP family end to end, every model traceable to the data, code and parameters that made it."""

__version__ = "0.1.0"
