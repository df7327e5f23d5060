"""Images and reports that find one another."""
