"""Which rows of a log are read: samples by row, row group or user, and the commands that write them."""
