"""Pre-training: the objective, the loop that every training runs in, and the stage."""
