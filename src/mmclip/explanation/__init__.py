"""Where an image answers to a phrase, and how well that points at what readers marked."""
