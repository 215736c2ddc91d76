"""`tunery backup` and `tunery restore`: the database and every object that its rows refer to, consistent."""
