"""`tq bench engine`: whole engines beside each other on one GPU, one after the other."""
