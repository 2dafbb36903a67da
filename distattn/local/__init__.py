"""Attention on one device."""
