"""`recpress compare`: methods side by side, and their report pages."""
