"""What splits and data sets share, and splits that share nothing."""
