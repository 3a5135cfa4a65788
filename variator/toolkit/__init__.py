"""The method: plugin maths, the canonical encoder, backbone families, plugin files, training, the bundle on disk."""
