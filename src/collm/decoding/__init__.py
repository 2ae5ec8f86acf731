"""Decoders as generators without I/O: policies, sampling, flows and their drivers."""
