"""Exports, model cards and publishing on the Hub."""
