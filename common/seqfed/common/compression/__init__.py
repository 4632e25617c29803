"""Fewer bytes: an update, or a new model's difference to the last one, as a payload of a few bits a number.

    payload, residual = encode(vector, layout, key, codec, residual)
    for part in decode(payload, layout, key, codec): ...            # float32 parts of the vector, in their order

`key` names whose payload it is (run seed, run, round, client): all that a codec draws comes of it, so that both sides draw the
same, and a payload of another round or client is refused. `codec` is the run's choice; what a payload says of itself has to
agree with it. Pure functions over flat vectors: the same payload on every machine, but for PowerSGD's, whose matrix products are
numpy's and may differ in their last bits; what a payload decodes to is the same everywhere.

Memory, in vectors of float32 beside the one given, the payload and the residual: to decode, some pieces; but for top-k, whose
numbers come all at once. To encode, some pieces for none, eden1 and PowerSGD; half a vector where symbols are gathered (rotq and
delta); 1.5 for top-k; and one more where rows are left out.

| codec | bits a number | unbiased | residual |
|---|---|---|---|
| none | 32 | exact | no |
| rotq8, rotq4 | 8, 4, less what Huffman's code saves | yes | no |
| eden1 | `fraction` | yes (see `pieces`) | no |
| topk | about 9 x `fraction` | no | error feedback |
| powersgd | grows with the root of a matrix's size | no | error feedback |
| delta8, delta4 | as rotq, rounded to the nearest | no | error feedback |

For masked sums there are `rotsub`, `lowrank.Side`, and the levels of rotq8 and rotq4 (`spec.LEVELS`), which have no payload of
this kind: there the terms say all.
"""

from seqfed.common.compression.codec import NAMES, Codec, Encoded, Key
from seqfed.common.compression.payload import decode, encode, largest

__all__ = ["NAMES", "Codec", "Encoded", "Key", "decode", "encode", "largest"]
