"""Engines -> one record of speed, memory, disk and quality -> tables and the report."""
