"""From raw folders to batches: records, images, text, and the data folder on disk."""
