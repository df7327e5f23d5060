"""From raw folders to batches: records, films, text, and the data folder on disk."""
