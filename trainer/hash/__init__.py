"""`recpress hash`: budget, tables and maps of ids, made or extended."""
