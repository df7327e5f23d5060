"""From raw folders and tables to data folders."""
