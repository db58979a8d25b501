"""Whether an adapter can be served, and everything that is wrong with it: in memory, or as a folder."""
