"""Thin wrappers over pyca/cryptography: digests, DSSE signatures, AEAD, HPKE, key derivation, Merkle trees."""
