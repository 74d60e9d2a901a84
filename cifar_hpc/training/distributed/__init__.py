"""Ranks: how they meet, agree, add gradients in a fixed order and watch each other."""
