"""Speed, memory and launches of a model, alone or beside another of mlx-lm's, in one run on this machine."""
