"""Knows bytes; nothing of tokens or models: an expert is a key (MoE layer, expert) and a block of bytes."""
