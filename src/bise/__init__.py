"""bise: run, serve and adapt Mistral-family open weights on the machine you own."""

__version__ = "0.1.0"
