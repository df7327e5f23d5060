"""Encoders, decoders and the MMCLIP model."""
