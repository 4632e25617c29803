"""The first run: a whole federation on this machine from one command."""

from seqfed.client.demo.cli import demo

__all__ = ["demo"]
