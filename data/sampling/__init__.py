"""Which rows of a log are read: samples by row, row group or user, and writing them as a log.

May import `dataset`.
"""
