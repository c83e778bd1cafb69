"""The pictures: one function each."""
