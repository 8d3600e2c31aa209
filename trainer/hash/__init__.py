"""`recpress hash`: id maps, learned or extended, within a budget."""
