"""The rules of the literature: each a pure function and a row in a table."""
