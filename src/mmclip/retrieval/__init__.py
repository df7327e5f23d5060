"""Films and reports that find one another."""
