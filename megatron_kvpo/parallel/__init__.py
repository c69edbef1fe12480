"""Ranks as named groups, and what travels between them."""
