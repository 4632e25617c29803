"""A data holder's files as sequences. Nothing of them leaves the machine but what `Source.schema` says."""

from seqfed.client.data.sequences import Batch, ClientData, Sequences
from seqfed.client.data.source import Source, open_source

__all__ = ["Batch", "ClientData", "Sequences", "Source", "open_source"]
