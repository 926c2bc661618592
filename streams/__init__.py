"""What is learnt, and in which order: one file, one family of streams, one or more configs that name it."""
