"""Plugins from a frozen backbone and text: data as batches, what a student is pulled to, and the loop around it."""

import os

# Batches differ in shape, and oneDNN keeps a compiled kernel for each of the last 1,024 shapes: several hundred MB for
# nothing, since making one anew costs no measurable time here. Read when the first kernel is made; nothing that
# measures speed imports this room.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
