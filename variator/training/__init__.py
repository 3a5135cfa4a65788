"""Plugins from a frozen backbone and text: data as batches, what a student is pulled to, and the loop around it."""
