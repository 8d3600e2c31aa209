"""`recpress doctor`: whether recpress can run here."""
