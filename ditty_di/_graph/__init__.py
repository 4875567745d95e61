"""Moved to ditty_di.config."""
