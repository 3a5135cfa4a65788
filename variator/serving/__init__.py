"""Our runtime inside other people's servers."""
