"""MMCLIP: masked medical contrastive language-image pre-training for chest X-rays and reports."""

__version__ = "0.1.0.dev0"
