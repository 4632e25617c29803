"""Generated stubs of protos/seqfed/v1; never edited by hand (see protos/generate.py)."""
