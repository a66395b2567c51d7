"""Layouts: found, checked, or refused."""
