"""Sums of encrypted updates: another way than masks to make the sums of a run with secure aggregation (CKKS, Cheon et al. 2017).

All clients have one secret key, which the server has not. Each encrypts the very numbers that it would mask; the server adds
up the ciphertexts, and two clients decrypt the sum, round it, and must agree on it to the bit. `scheme` is the
arithmetic, `messages` what the parties say, `server` the server's half. Only clients encrypt: with TenSEAL, in
`seqfed.client.ckks`. The server adds words modulo a prime, and parses nothing that a client sends.

What it is worth: the server alone learns the sums only. The server and any one client together read everything, and a server
that lies can have a client decrypt whatever it likes; hence privacy.mode = "semi_honest".
"""
