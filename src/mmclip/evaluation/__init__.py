"""What a model is worth: scores, metrics, intervals, protocols, and the pages that say so."""
