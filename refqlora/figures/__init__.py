"""The pictures: one function each, which takes facts and writes a PNG."""
