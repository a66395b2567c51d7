"""Hooks that did not fire: which, and why."""
