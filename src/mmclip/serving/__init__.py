"""`mmclip serve`: a page and an API on this machine."""
