"""Bundle -> engines for this machine, and the runtime that serves them. Needs no torch."""
