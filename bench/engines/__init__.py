"""How is each engine driven? One adapter a file, run by that engine's Python: imports only it and stdlib."""
