"""Anybody, offline: verify a chain, a trace and the disclosures that answer it."""
