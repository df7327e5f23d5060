"""One reader a data set: its folder as downloaded -> one record per image, in a stable order."""
