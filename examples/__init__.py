"""Short programs that show how parts of gtr-turbo are used. Not installed."""
