"""One reader a data set: its folder as downloaded -> one record a film, in a stable order."""
