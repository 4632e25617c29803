"""Secure aggregation: the server learns the sum over a round's clients, and nothing of any one of them.

SecAgg+ (Bell et al. 2020, https://eprint.iacr.org/2020/704) with the double mask of Bonawitz et al. 2017
(https://eprint.iacr.org/2017/281), keys signed by the clients' identities, and a round in which the clients agree on who
is in the sum. Pure: no I/O, no clock, no threads but those of `prg.threads`, and nothing random but the operating system's.

    terms      what all parties of one masked sum must agree on, and its digest, which is in everything they sign
    agreed     those terms by a run's settings
    graph      who shares secrets with whom, and how many shares open one
    plan       what follows from the terms and the roster: circles, thresholds, what is signed
    messages   what is said, step by step
    client     one sum at a client
    server     one sum at the server, as states and events
    checks     what each message must be
    unmasking  the secrets opened, the masks removed, the sums checked
    trust      whose masking key is whose
    shamir     secrets in shares
    keys       key agreement, key derivation, sealing, commitments, signatures
    prg        masks from keys, added in place
    packing    integers of b bits as bytes
"""
