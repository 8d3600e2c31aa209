"""Parts of a Parquet file in memory."""

from recpress.data.dataset.column_chunks import ColumnChunkFile


def test_pieces_are_read_to_their_end():
    file = ColumnChunkFile([(4, b"abcdef")], 20)
    file.seek(6)
    assert bytes(file.read()) == b"cdef"
    file.seek(4)
    assert bytes(file.read(2)) == b"ab"
