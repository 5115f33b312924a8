"""Knows tokens and hash tables; nothing of memory or devices."""
