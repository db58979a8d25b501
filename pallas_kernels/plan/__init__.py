"""The routing plan: rows sorted by expert and slot, and the tiles that they are cut into."""
