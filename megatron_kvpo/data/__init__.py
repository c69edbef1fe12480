"""Prompts and videos."""
